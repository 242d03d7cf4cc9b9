"""Pictures of a run for the docs: `python -m infra.screenshots DIR`, while `make up` runs. Needs Chromium.

Starts restore/folder on the noisy photographs with their originals to score against, waits for its end, and takes the
Prefect pages of the run and the report.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.deployments import run_deployment
from prefect.settings import PREFECT_API_URL, temporary_settings

from infra.console import BUCKET, ROOT, Console

_WAIT_MS = 60_000  # that a page may take to fetch and draw what it shows
_COLOURS = 256  # of a picture: pages are flat, and small files suit a repository


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where to write the pictures")
    parser.add_argument("--home", type=Path, default=ROOT / ".console", help="of the console that runs")
    options = parser.parse_args()
    console = Console.load(options.home.absolute())
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("no chromium here: apt-get install chromium")
    if not console.running("prefect"):
        sys.exit(f"no console runs in {options.home}: make up")
    ui = f"http://127.0.0.1:{console.ports['prefect']}"
    with temporary_settings({PREFECT_API_URL: f"{ui}/api"}), get_client(sync_client=True) as client:
        originals = str(console.home / "photos" / "original")
        run = run_deployment("restore/folder", parameters={"reference": originals, "fresh": True}, timeout=300)
        deployment = client.read_deployment_by_name("restore/folder").id
        of_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))
        shown = {one.key: one.id for one in client.read_artifacts(artifact_filter=of_run)}
    options.folder.mkdir(parents=True, exist_ok=True)
    report = options.home.absolute() / "s3" / BUCKET / "restored" / "incoming" / "report.html"
    pages = {
        "run": (f"{ui}/runs/flow-run/{run.id}", 1300),
        "sheet": (f"{ui}/artifacts/artifact/{shown['sheet']}", 900),
        "history": (f"{ui}/artifacts/artifact/{shown['history-folder']}", 500),
        "form": (f"{ui}/deployments/deployment/{deployment}/run", 2000),
        "report": (f"file://{report}", 2600),
    }
    for name, (url, height) in pages.items():
        _take(chromium, url, options.folder / f"{name}.png", height)
        print(options.folder / f"{name}.png")


def _take(chromium: str, url: str, path: Path, height: int) -> None:
    with tempfile.TemporaryDirectory() as profile:
        command = [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}",
            f"--window-size=1200,{height}", f"--virtual-time-budget={_WAIT_MS}", f"--screenshot={path}", url,
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    Image.open(path).convert("RGB").quantize(_COLOURS).save(path, optimize=True)


main()
