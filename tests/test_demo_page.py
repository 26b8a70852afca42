"""The playground in a real browser: photos are dropped, a mixer is chosen, and the page shows what comes of them."""

import os
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
from PIL import Image

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
MISSING = [name for name in ("gradio", "selenium") if not find_spec(name)]
MISSING += [str(path) for path in (CHROMIUM, DRIVER) if not path.exists()]
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.filterwarnings("default"),  # of selenium, whose sockets are its own
]


@pytest.fixture
def address(tmp_path):
    """The address of the command's page, with drawn photos to start with; ended as by Ctrl-C."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mixup_recipes", "demo", "--photos", "synthetic", "--port", str(port)]
    (tmp_path / "kept").mkdir()
    env = tiny.environment() | {"TMPDIR": str(tmp_path / "kept")}
    env |= {"PYTHONPATH": os.pathsep.join([str(tiny.ROOT), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True) as page:
        line = page.stdout.readline()
        assert line == f"The page is at http://127.0.0.1:{port}/ (Ctrl-C ends it).\n"
        yield f"http://127.0.0.1:{port}/"
        page.send_signal(signal.SIGINT)
        assert page.wait(60) == 0
    assert not list((tmp_path / "kept").iterdir())  # what was dropped is gone


@pytest.fixture
def browser():
    """A headless Chromium."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
    yield driver
    driver.quit()


def wait(what, seconds=60.0):
    """What a function gives once it gives something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.1)
    raise AssertionError("the page did not get there")


def test_two_dropped_photos_are_mixed_by_cutmix_and_mistakes_are_one_message(address, browser, tmp_path):
    found = lambda css: browser.find_elements("css selector", css)  # noqa: E731
    texts = "return [...document.querySelectorAll('#result %s')].map(part => part.textContent)"
    titles = lambda: browser.execute_script(texts % "h3")  # noqa: E731  in one step, as the page may redraw them
    told = lambda: browser.execute_script(texts % "[role=alert]")  # noqa: E731
    drop = lambda *names: found("#photos input[type=file]")[0].send_keys(  # noqa: E731
        "\n".join(str(tmp_path / name) for name in names)
    )
    for name in ("red", "green"):
        Image.new("RGB", (300, 200), name).save(tmp_path / f"{name}.png")
    (tmp_path / "words.txt").write_text("no photo")

    browser.get(address)
    wait(lambda: titles() == ["disc", "triangle", "square", "pentagon"])
    drop("red.png", "green.png")
    wait(lambda: titles() == ["red", "green"])
    assert [name.text for name in found("#thumbnails figcaption")] == ["red", "green"]
    for mixer in ("mixup", "cutmix"):
        found("#mixer input")[0].click()
        wait(lambda name=mixer: found(f"[role=option][data-value={name}], [role=option][aria-label={name}]"))[0].click()
        wait(lambda name=mixer: len(found("#result .none")) == {"mixup": 2, "cutmix": 0}[name] and found(".card"))
    pictures = [picture for picture in found("#result img") if picture.get_attribute("naturalWidth") != "0"]
    assert [picture.get_attribute("alt") for picture in pictures] == [
        "red, mixed", "mask of red", "green, mixed", "mask of green"
    ]  # fmt: skip
    labels = [label.text for label in found("#result .label")]
    shares = [float(word) for word in labels[0].split() if word[0].isdigit()]
    assert sum(shares) == pytest.approx(1, abs=0.011) and all("red" in text and "green" in text for text in labels)

    alpha = wait(lambda: found(".argument-alpha input"))[0]
    alpha.clear()
    alpha.send_keys("-1")
    found("#mix")[0].click()
    wait(lambda: told() == ["cutmix: alpha must be a number above 0, got -1.0"])

    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    )
    browser.get(address)
    wait(lambda: len(titles()) == 4)
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    drop("red.png", "words.txt")
    wait(lambda: told() == ["words cannot be read as a photo: not an image of a known format."])

    assert not [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]
    asked = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert asked and all(name.startswith((address, "data:", "blob:")) for name in asked)
