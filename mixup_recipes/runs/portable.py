"""A classifier as one file that other programs run without this one: ONNX, TorchScript, or a program of torch.export.

The graph has one input, ``pixels``, float32 (N, 3, H, W), RGB from 0 to 1, and one output, ``logits``, float32 (N, K);
or ``probabilities``, a sigmoid of each, where an image may have several labels. The number of images N is free, height
and width are not. No file holds a path of this machine.
"""

import io
import json
import warnings
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

CONFIG = "config.json"
"""The name of the metadata in a file of torch; ONNX has a table of text for them, ``metadata_props``."""
OPSET, IR_VERSION = 18, 8  # of ONNX 1.13, which ONNX Runtime reads from 1.14 (2023) on, on phones too

Answer = Callable[[Tensor], Tensor]
"""``pixels`` to the output."""


class Classifier(nn.Module):
    """A network behind its own normalisation: ``pixels`` to ``logits``, in float32, for use only.

    ``several``: to ``probabilities``, of classes that do not exclude each other.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], several: bool = False):
        super().__init__()
        self.output = "probabilities" if several else "logits"
        self.net = net.float().to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        logits = self.net((pixels - self.mean) / self.std)
        return logits if self.output == "logits" else logits.sigmoid()


class Use(NamedTuple):
    """Lines of Python for a program that uses the file, whose name goes where ``FILE`` stands."""

    package: str
    load: str
    ask: str
    """From ``pixels``, an array of numpy, to ``logits``, or what ``Classifier.output`` says instead."""
    names: str
    """The names of the classes."""


class Format(NamedTuple):
    """A format of such files."""

    ending: str
    packages: tuple[str, ...]
    """What it needs beside our own requirements: the extra ``export``."""
    write: Callable[[Classifier, tuple[int, ...], dict[str, Any]], bytes]
    """The content of the file, from the classifier, height and width, and the metadata."""
    open: Callable[[bytes], Answer]
    """What another program gets from that content."""
    use: Use


def traced(size: tuple[int, ...]) -> Tensor:
    """Images to trace a graph with: two, because torch takes one for a number that never changes."""
    return torch.zeros(2, 3, *size)


def write_torchscript(net: Classifier, size: tuple[int, ...], metadata: dict[str, Any]) -> bytes:
    """TorchScript: a trace."""
    whole, bare = io.BytesIO(), io.BytesIO()
    with warnings.catch_warnings():
        # torch advises torch.export instead, which is there too. What depends on the size of the images becomes a
        # constant, and so it may; what depends on their number would fail where answers are compared.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        graph = torch.jit.trace(net, traced(size), check_trace=False)
        torch.jit.save(graph, whole, _extra_files={CONFIG: json.dumps(metadata, indent=1)})
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(bare, "w") as new:
        for entry in old.infolist():
            if not entry.filename.endswith(".debug_pkl"):  # where each line of source lies on this machine
                new.writestr(entry, old.read(entry))
    return bare.getvalue()


def open_torchscript(content: bytes) -> Answer:
    """The graph in such a file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # as above
        return torch.jit.load(io.BytesIO(content))


def program_of(net: Classifier, size: tuple[int, ...]) -> ExportedProgram:
    """The graph by torch.export, without the places of its source."""
    program = torch.export.export(net, (traced(size),), dynamic_shapes=({0: Dim("batch", min=1)},))
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return program


def write_torch_export(net: Classifier, size: tuple[int, ...], metadata: dict[str, Any]) -> bytes:
    """What ``torch.export.save`` writes."""
    file = io.BytesIO()
    torch.export.save(program_of(net, size), file, extra_files={CONFIG: json.dumps(metadata, indent=1)})
    return file.getvalue()


def open_torch_export(content: bytes) -> Answer:
    """The program in such a file."""
    return torch.export.load(io.BytesIO(content)).module()


def write_onnx(net: Classifier, size: tuple[int, ...], metadata: dict[str, Any]) -> bytes:
    """ONNX with the weights inside, and without torch's notes of where each operation came from."""
    program = torch.onnx.export(
        program_of(net, size),
        (traced(size),),
        dynamo=True,
        input_names=["pixels"],
        output_names=[net.output],
        dynamic_shapes=({0: "batch"},),
        opset_version=OPSET,
        external_data=False,
        verbose=False,
    )
    assert program is not None
    model = program.model
    nodes = list(model.graph.all_nodes())
    values = [*model.graph.inputs, *model.graph.initializers.values(), *(v for node in nodes for v in node.outputs)]
    parts: list[Any] = [model.graph, *nodes, *values]
    for part in parts:
        part.metadata_props.clear()
    model.metadata_props.update({k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()})
    model.ir_version = IR_VERSION
    return program.model_proto.SerializeToString()


def open_onnx(content: bytes) -> Answer:
    """The graph in such a file, run by ONNX Runtime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])


TORCH_NAMES = f'json.loads(files["{CONFIG}"])["class_names"]'
FORMATS = {
    "onnx": Format(
        ".onnx",
        ("onnx", "onnxscript", "onnxruntime"),
        write_onnx,
        open_onnx,
        Use(
            "onnxruntime",
            "model = onnxruntime.InferenceSession(FILE)",
            '(logits,) = model.run(["logits"], {"pixels": pixels})',
            'json.loads(model.get_modelmeta().custom_metadata_map["class_names"])',
        ),
    ),
    "torchscript": Format(
        ".pt",
        (),
        write_torchscript,
        open_torchscript,
        Use(
            "torch",
            f'model = torch.jit.load(FILE, _extra_files=(files := {{"{CONFIG}": ""}}))',
            "logits = model(torch.from_numpy(pixels))",
            TORCH_NAMES,
        ),
    ),
    "torch_export": Format(
        ".pt2",
        (),
        write_torch_export,
        open_torch_export,
        Use(
            "torch",
            f'model = torch.export.load(FILE, extra_files=(files := {{"{CONFIG}": ""}})).module()',
            "logits = model(torch.from_numpy(pixels))",
            TORCH_NAMES,
        ),
    ),
}
