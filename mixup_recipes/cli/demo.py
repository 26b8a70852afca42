"""The command that opens a page in the browser, or writes the page of a trained classifier for a Space."""

import importlib.util
import os
import signal
import tempfile
from pathlib import Path
from typing import Annotated

from mixup_recipes.cli.base import Whole, app, said, text
from mixup_recipes.typed import UserError


@app.command
def demo(
    run: Annotated[
        str | None, text("Model that the page asks: a run folder, timm name or hf-hub:OWNER/NAME.", "--run", "--model")
    ] = None,
    *,
    photos: Annotated[
        str | None,
        text(
            "Folder of photos to start with, or 'synthetic' for drawn shapes. The default is the run's own photos if "
            "they are on this machine, else the prepared groceries, else drawn shapes."
        ),
    ] = None,
    host: Annotated[str, text("Address that the page listens at. 0.0.0.0 lets other machines open it.")] = "127.0.0.1",
    port: Annotated[
        Whole | None, said("Port that the page listens at. The default is the first free one from 7860 on.")
    ] = None,
    share_to_space: Annotated[
        Path | None, said("Write a page of RUN for a Space into this new folder, and open no page.")
    ] = None,
) -> None:
    """Open a page that mixes photos and shows masks, labels and what a trained model says of the mixed photos.

    Without RUN the page asks the prepared weights of efficientnet_lite0, if they are on this machine. Nothing is sent
    to others. The page needs the extra: `pip install 'mixup-recipes[demo]'`. --share_to_space does not need it. That
    flag writes a folder that you can push to a Space of yours.
    """
    if share_to_space is not None:
        from mixup_recipes.demo.space import write_space

        if run is None:
            raise UserError("--share_to_space writes the page of a model; name a run folder, timm name or hf-hub: id")
        print(write_space(run, share_to_space))
        return
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the page needs: pip install 'mixup-recipes[demo]'")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the photos go
    with tempfile.TemporaryDirectory(prefix="mixup-recipes-demo-") as folder:
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["GRADIO_TEMP_DIR"] = folder  # what people drop is gone when the command ends
        from mixup_recipes.demo.models import open_named
        from mixup_recipes.demo.page import serve

        serve(open_named(run), photos, host, port, Path(folder))
