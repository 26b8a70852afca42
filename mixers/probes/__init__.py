"""Statistical probes for any callable that mixes a batch: ours, another library's, a stranger's.

``probe(subject)`` looks at a black box ``mix(x, y) -> (x', y')`` from outside. It uses images whose pixels tell where
they come from, and labels that do so too. It returns a ``Finding`` by name: ``holds`` is True or False for what the
contract asks of everyone, and None for a plain fact. ``mixers.testing`` holds a ``Mixer`` against the whole contract.

Shapes: B images, C channels, H W pixels, K classes.
"""

from . import effects, laws, manners  # each enters its probes, in this order
from .bench import CLASSES, PROBES, Bench, Finding, Mix, Subject, of_mixer, raised, seed_globals
from .laws import box_law, judge, lambdas


def probe(subject: Subject) -> dict[str, Finding]:
    """Find out everything about a subject, by the name of the probe. An exception is a finding too.

    Raises ``ValueError`` if the subject cannot be called with a batch of 8 float images at all.
    """
    bench = Bench(subject)
    findings = {}
    for name, run in PROBES.items():
        try:
            findings[name] = run(bench)
        except (Exception, SystemExit) as error:
            findings[name] = Finding(False, raised(error))
    return findings


__all__ = [
    "CLASSES",
    "PROBES",
    "Bench",
    "Finding",
    "Mix",
    "Subject",
    "box_law",
    "effects",
    "judge",
    "lambdas",
    "laws",
    "manners",
    "of_mixer",
    "probe",
    "raised",
    "seed_globals",
]
