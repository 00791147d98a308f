"""ComfyUI's page in a headless Chromium: load a workflow, press Run, wait, look. For the browser tests and tools/workshop/workflows.py.

with browser() as chromium, chromium.page(server.url, vue=True) as canvas:
    canvas.load(workflow)
    canvas.run()
    canvas.screenshot(Path("ran.png"))
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from client import Client
from playwright.sync_api import BrowserType, ConsoleMessage, Locator, Page, sync_playwright
from results import make_folder

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# what the frontend's own browser tests set, so that no tour, tooltip or restored tab stands in the way
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.OnboardingCoachmarks.Seen": ["appMode", "firstRun"],  # of frontend 1.58
    "Comfy.VersionCompatibility.DisableWarnings": True,
    "Comfy.EnableTooltips": False,
    "Comfy.Minimap.Visible": False,
    "Comfy.Workflow.Persist": False,
    "Comfy.Validation.Workflows": True,
    "Comfy.Locale": "en",
}
READY = "() => window.app?.extensionManager && window.app.vueAppReady && window.app.graph && !window.app.extensionManager.spinner"
LISTEN = """() => { window.__events = []; for (const kind of ['executed', 'execution_success', 'execution_error', 'execution_interrupted'])
            app.api.addEventListener(kind, e => window.__events.push([kind, e.detail])) }"""
ENDED = "() => window.__events.some(e => ['execution_success', 'execution_error', 'execution_interrupted'].includes(e[0]))"
# as frontend 1.47 calls them, and as 1.58 does
TOAST = ".p-toast-message, [data-testid='toast']"
CLOSE_TOAST = ".p-toast-close-button, [data-testid='toast-close']"
# every toast is noted when it appears: it may be gone when somebody looks
WATCH = f"""window.__toasts = []; new MutationObserver(changes => {{ for (const change of changes) for (const node of change.addedNodes)
    for (const toast of node.matches?.("{TOAST}") ? [node] : node.querySelectorAll?.("{TOAST}") ?? [])
        window.__toasts.push(toast.innerText) }}).observe(document, {{childList: true, subtree: true}})"""
INSTALLED = (
    "google-chrome",
    "google-chrome-stable",
    "chromium",
    "chromium-browser",
    "chrome",
    "msedge",
    "microsoft-edge",
)
ELSEWHERE = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "C:/Program Files/Google/Chrome/Application/chrome.exe",
    "C:/Program Files (x86)/Google/Chrome/Application/chrome.exe",
    "C:/Program Files (x86)/Microsoft/Edge/Application/msedge.exe",
)


class NoBrowser(RuntimeError):
    """There is no Chromium or Chrome here, and none could be installed; the sentence says what was tried."""


def find_browser() -> Path | None:
    """An installed Chromium, Chrome or Edge; $KINDRED_BROWSER names another."""
    chosen, own = (
        os.environ.get("KINDRED_BROWSER"),
        os.environ.get("LOCALAPPDATA"),
    )  # Windows: where Chrome goes without an administrator
    users = [Path(own, "Google", "Chrome", "Application", "chrome.exe")] if own else []
    paths = [chosen] if chosen else [*map(shutil.which, INSTALLED), *ELSEWHERE, *users]
    return next((Path(path) for path in paths if path and Path(path).is_file()), None)


def get_browser() -> Path:
    """The installed browser; on Debian and Ubuntu, where it may, it installs Chromium first. Raises NoBrowser."""
    program = find_browser()
    if program:
        return program
    if chosen := os.environ.get("KINDRED_BROWSER"):
        raise NoBrowser(
            f"KINDRED_BROWSER names {chosen}, which is no file. Correct it, or unset it."
        )
    apt, sudo = shutil.which("apt-get"), shutil.which("sudo")
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    if not apt or not (root or sudo):
        raise NoBrowser(
            "no Chromium, Chrome or Edge was found on this machine, and it cannot be installed here. Install one, or name it "
            "in KINDRED_BROWSER."
        )
    prefix = [] if root else [sudo, "-n"]
    print(
        "No browser here: installing chromium with apt-get (about 110 MB, once).",
        file=sys.stderr,
        flush=True,
    )
    for arguments in (
        ["update", "-q"],
        ["install", "-y", "-q", "--no-install-recommends", "chromium"],
    ):
        done = subprocess.run(
            [*prefix, apt, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
        )
        if done.returncode:
            raise NoBrowser(f"apt-get {' '.join(arguments)} failed: {done.stdout.strip()[-300:]}")
    program = find_browser()
    if not program:
        raise NoBrowser("apt-get installed chromium, but there is no such program on PATH.")
    return program


@dataclass
class Canvas:
    """A page of ComfyUI. `errors` gathers what a user would call broken: exceptions in the page and console errors that name the pack."""

    page: Page
    client: Client
    vue: bool
    errors: list[str] = field(default_factory=list)

    def command(self, name: str) -> None:
        self.page.evaluate("c => app.extensionManager.command.execute(c)", name)

    def load(self, workflow: Path | Mapping[str, Any], name: str = "workflow") -> None:
        """A workflow file the way a user opens one, or the content of one."""
        self.page.evaluate("() => { for (const n of app.graph.nodes) n.of_before = true }")
        if isinstance(workflow, Path):
            self.page.set_input_files("#comfy-file-input", workflow)
            wanted = len(json.loads(workflow.read_text("utf-8"))["nodes"])
        else:
            self.page.evaluate(
                "async ([w, name]) => { await app.loadGraphData(w, true, true, name) }",
                [workflow, name],
            )
            wanted = len(workflow["nodes"])
        self.page.wait_for_function(
            "n => app.graph.nodes.length === n && !app.graph.nodes.some(n => n.of_before)",
            arg=wanted,
            timeout=120_000,
        )
        if wanted:
            self.fit()

    def load_api(self, graph: Mapping[str, Any], name: str) -> None:
        self.page.evaluate("async ([g, name]) => await app.loadApiJson(g, name)", [graph, name])
        self.page.wait_for_function(
            "n => app.graph.nodes.length === n", arg=len(graph), timeout=120_000
        )

    def fit(self) -> None:
        self.page.wait_for_timeout(300)
        self.command("Comfy.Canvas.FitView")
        self.page.wait_for_timeout(300)

    def serialize(self) -> dict[str, Any]:
        """Stringified in the page: evaluate() would turn undefined into null, which the schema refuses."""
        return json.loads(self.page.evaluate("JSON.stringify(app.graph.serialize())"))

    def prompt(self) -> dict[str, Any]:
        """What the page would post to /prompt."""
        return json.loads(
            self.page.evaluate("async () => JSON.stringify((await app.graphToPrompt()).output)")
        )

    def toasts(self) -> list[str]:
        """What popped up since the page was opened or tidied, also if it went away again."""
        return self.page.evaluate("window.__toasts")

    def tidy(self) -> None:
        """Forget complaints, and close what stands over the canvas."""
        self.errors.clear()
        # in the page, at once: one that fades away meanwhile cannot be clicked from here
        close = f'document.querySelectorAll("{CLOSE_TOAST}")'
        self.page.evaluate(f"{close}.forEach(button => button.click())")
        self.page.wait_for_function(f"!{close}.length")
        self.page.evaluate("window.__toasts.length = 0")
        if (dismiss := self.page.get_by_test_id("error-overlay-dismiss")).count():
            dismiss.first.click()

    def listen(self) -> None:
        """Take note, from now on, of what runs end with."""
        self.page.evaluate(LISTEN)

    def press_run(self) -> None:
        """A click on the Run button, as a user does."""
        self.listen()
        self.page.get_by_test_id("queue-button").first.click()

    def wait(self, seconds: float = 600) -> dict[str, Any]:
        """Until the run has ended; gives {"kind": execution_success | execution_error | ..., "detail": ...}."""
        self.page.wait_for_function(ENDED, timeout=1000 * seconds)
        kind, detail = next(
            e for e in reversed(self.page.evaluate("window.__events")) if e[0] != "executed"
        )
        return {"kind": kind, "detail": detail}

    def run(self, seconds: float = 600) -> dict[str, Any]:
        self.press_run()
        return self.wait(seconds)

    def node(self, kind: str) -> int:
        """The id of the first node of a type."""
        return int(self.page.evaluate("t => app.graph.nodes.find(n => n.type === t).id", kind))

    def box(self, node: int) -> dict[str, float]:
        """Where a node stands on the screen: x, y, width, height in pixels, its title included."""
        if self.vue:
            return self.body(node).bounding_box()
        return self.page.evaluate(
            """id => {
            const n = app.graph.getNodeById(id), d = app.canvas.ds, r = app.canvas.canvas.getBoundingClientRect(), b = n.boundingRect;
            return {x: r.left + (b[0] + d.offset[0]) * d.scale, y: r.top + (b[1] + d.offset[1]) * d.scale,
                    width: b[2] * d.scale, height: b[3] * d.scale} }""",
            node,
        )

    def body(self, node: int) -> Locator:
        """The node's element where nodes are elements (Vue)."""
        return self.page.locator(f'[data-node-id="{node}"]').first

    def pictures(self, node: int) -> list[str]:
        """The addresses of the pictures that a node shows."""
        if self.vue:
            return self.body(node).locator("img").evaluate_all("shown => shown.map(img => img.src)")
        return self.page.evaluate(
            "id => (app.graph.getNodeById(id).imgs ?? []).map(img => img.src)", node
        )

    def outputs(self, ended: Mapping[str, Any]) -> dict[str, Any]:
        """Of a run that `run` told the end of, what each node gave out; the host keeps it a moment later."""
        while (kept := self.client.history(ended["detail"]["prompt_id"])) is None:
            self.page.wait_for_timeout(100)
        return kept["outputs"]

    def wait_for_pictures(self, node: int, seconds: float = 120) -> None:
        """Pictures arrive after the run has ended, later on a busy machine."""
        shown = (
            f"document.querySelectorAll('[data-node-id=\"{node}\"] img').length"
            if self.vue
            else f"(app.graph.getNodeById({node}).imgs?.length ?? 0)"
        )
        self.page.wait_for_function(f"() => {shown} > 0", timeout=1000 * seconds)

    def screenshot(self, path: Path, node: int | None = None, margin: int = 12) -> None:
        """The page, or only the part around a node."""
        make_folder(path.parent)
        if node is None:
            self.page.screenshot(path=path)
            return
        box = self.box(node)
        self.page.screenshot(
            path=path,
            clip={
                "x": max(box["x"] - margin, 0),
                "y": max(box["y"] - margin, 0),
                "width": box["width"] + 2 * margin,
                "height": box["height"] + 2 * margin,
            },
        )


def complain(canvas: Canvas, message: ConsoleMessage) -> None:
    """Note a console error that names the pack; a help page is looked for in the user's language first, and need not be there."""
    address = message.location.get("url", "")
    if (
        message.type == "error"
        and "/extensions/kindred/" in message.text + address
        and not address.endswith(".md")
    ):
        canvas.errors.append(f"{message.text} {address}")


@dataclass(frozen=True)
class Browser:
    """A Chromium that opens pages of a host."""

    kind: BrowserType
    program: Path

    @contextmanager
    def page(
        self, url: str, vue: bool, size: tuple[int, int] = (1600, 900), **settings: Any
    ) -> Iterator[Canvas]:
        """A fresh user's page at `url`, in the renderer asked for; only the host can be reached from it. settings: by id, dots as __."""
        client = Client(url)
        chosen = (
            SETTINGS
            | {"Comfy.VueNodes.Enabled": vue}
            | {key.replace("__", "."): value for key, value in settings.items()}
        )
        for key, value in chosen.items():
            client.json(f"/api/settings/{key}", value)
        with tempfile.TemporaryDirectory(
            prefix="kindred-browser-", ignore_cleanup_errors=True
        ) as profile:
            context = self.kind.launch_persistent_context(
                profile,
                executable_path=str(self.program),
                headless=True,
                args=list(FLAGS),
                viewport=dict(zip(("width", "height"), size)),
            )
            try:
                context.route(
                    "**/*",
                    lambda route: (
                        route.continue_()
                        if route.request.url.startswith((url, "data:", "blob:"))
                        else route.abort()
                    ),
                )
                context.add_init_script(WATCH)
                canvas = Canvas(context.pages[0], client, vue)
                canvas.page.on("pageerror", lambda error: canvas.errors.append(str(error)))
                canvas.page.on("console", lambda message: complain(canvas, message))
                canvas.page.goto(url, wait_until="domcontentloaded")
                canvas.page.wait_for_function(READY, timeout=120_000)
                canvas.page.wait_for_selector(".p-blockui-mask", state="hidden")
                yield canvas
            finally:
                context.close()


@contextmanager
def browser() -> Iterator[Browser]:
    """Raises NoBrowser where there is none."""
    program = get_browser()
    with sync_playwright() as playwright:
        yield Browser(playwright.chromium, program)
