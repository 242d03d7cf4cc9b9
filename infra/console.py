"""`make up` and `make down`: everything that a data team has, on this machine and on loopback alone.

A Prefect server (on PostgreSQL where its programs are installed, else on SQLite), a Ray head, an S3 server with a made
GoPro tree and noisy photographs in its bucket, the work pool with a worker, and the deployments of prefect.yaml.
State, logs and the random keys of the S3 server lie in `.console/`.
"""

import argparse
import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
BUCKET = "nafnet"
POOL = "restoration"
_PORTS = {  # taken ones give way to free ones
    "prefect": 4200, "s3": 9000, "ray": 6379, "dashboard": 8265, "metrics": 9100, "postgres": 5442
}  # fmt: skip
_START_SECONDS = 120
_STOP_SECONDS = 30


@dataclass
class Console:
    """What runs, by name: pid and the start time that tells it from a later process of the same pid."""

    home: Path
    ports: dict[str, int] = field(default_factory=dict)
    pids: dict[str, tuple[int, str]] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def state(self) -> Path:
        return self.home / "state.json"

    def save(self) -> None:
        """Record what runs, readable by its owner alone: the S3 server's keys are in it."""
        self.home.mkdir(parents=True, exist_ok=True)
        self.state.touch(mode=0o600)
        self.state.write_text(json.dumps({"ports": self.ports, "pids": self.pids, "environment": self.environment}))

    @classmethod
    def load(cls, home: Path) -> "Console":
        """What was recorded, or nothing."""
        path = home / "state.json"
        recorded = json.loads(path.read_text()) if path.exists() else {}
        pids = {name: (pid, since) for name, (pid, since) in recorded.pop("pids", {}).items()}
        return cls(home, pids=pids, **recorded)

    def running(self, name: str) -> bool:
        """Whether the process of this name is still the one that was started."""
        pid, since = self.pids.get(name, (0, ""))
        return bool(pid) and _since(pid) == since

    def start(self, name: str, *command: object, user: str | None = None) -> None:
        """Start a process of its own session, its output in NAME.log."""
        # A shell that starts us in the background has SIGINT ignored, with which a worker stops itself.
        on_interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
        with (self.home / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [str(word) for word in command], cwd=self.home, env={**os.environ, **self.environment}, user=user,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        signal.signal(signal.SIGINT, on_interrupt)
        self.pids[name] = (process.pid, _since(process.pid))
        self.save()

    def stop(self, name: str) -> None:
        """End a process: SIGTERM, and SIGKILL for what of its session is left half a minute later."""
        if not self.running(name):
            return
        pid, _ = self.pids[name]
        _send(pid, signal.SIGINT if name == "postgres" else signal.SIGTERM)  # SIGTERM has it wait for its clients
        deadline = time.monotonic() + _STOP_SECONDS
        while self.running(name) and time.monotonic() < deadline:
            time.sleep(0.1)
        for one in _session(pid):
            _send(one, signal.SIGKILL)

    def run(self, *command: object) -> str:
        """The output of a command. Raises RuntimeError with what it said when it fails."""
        done = subprocess.run(
            [str(word) for word in command], cwd=ROOT, env={**os.environ, **self.environment}, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{command[0]} {command[1]} failed:\n{done.stdout}{done.stderr}")
        return done.stdout

    def wait(self, name: str, ready: Callable[[], bool]) -> None:
        """Until `ready`. Raises RuntimeError with the end of the log when the process ends first, or takes too long."""
        deadline = time.monotonic() + _START_SECONDS
        while not ready():
            if not self.running(name) or time.monotonic() > deadline:
                log = (self.home / f"{name}.log").read_text()[-2000:]
                raise RuntimeError(f"{name} did not start; the end of {self.home}/{name}.log:\n{log}")
            time.sleep(0.2)


def up(home: Path) -> Console:
    """Start what is not running, and say where it is."""
    console = Console.load(home)
    if any(console.running(name) for name in console.pids):
        raise RuntimeError(f"already up, or partly so: make down first (state in {home})")
    console = Console(home, ports={name: _port(wanted) for name, wanted in _PORTS.items()})
    console.save()
    try:
        _storage(console)
        _database(console)
        _server(console)
        _ray(console)
        _deployments(console)
    except BaseException:
        down(home)
        raise
    return console


def down(home: Path) -> None:
    """Stop everything, the last started first. Data and logs stay."""
    console = Console.load(home)
    for name in reversed(console.pids):
        console.stop(name)
        print(f"stopped {name}", flush=True)
    console.state.unlink(missing_ok=True)


def _storage(console: Console) -> None:
    """An S3 server with random keys, its bucket filled."""
    key, secret = secrets.token_hex(10).upper(), secrets.token_hex(20)
    console.environment |= {
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{console.ports['s3']}",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",  # with a range it sends the whole object's checksum
    }
    bucket = console.home / "s3" / BUCKET
    if not (bucket / "GoPro").exists():
        print("filling the bucket")
        console.run(BIN / "nafnet", "datasets", "make", bucket / "GoPro", "--like", "gopro", "--images", 8)
        console.run(
            sys.executable, "-c", "import sys; from pathlib import Path; from pipelines.demo import make_photos; "
            "make_photos(Path(sys.argv[1]))", console.home / "photos",
        )  # fmt: skip
        shutil.copytree(console.home / "photos" / "degraded", bucket / "incoming")
    address = f"127.0.0.1:{console.ports['s3']}"
    # The keys are in its environment, not on its command line, which every user of the machine can read.
    console.environment["RCLONE_AUTH_KEY"] = f'"{key},{secret}"'  # a list of one pair
    console.start("s3", BIN / "rclone", "serve", "s3", "--addr", address, "--dir-cache-time", "1s", console.home / "s3")
    del console.environment["RCLONE_AUTH_KEY"]
    console.wait("s3", lambda: _listens(console.ports["s3"]))


def _database(console: Console) -> None:
    """PostgreSQL, where it is installed; it refuses to run as root, and then needs its own user."""
    console.environment["PREFECT_HOME"] = str(console.home / "prefect")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin")) or [
        Path(path).parent for path in [shutil.which("initdb")] if path
    ]
    if not found:
        print("PostgreSQL is not installed: Prefect keeps its data in SQLite")
        return
    bin_, data, port = found[-1], console.home / "postgres", console.ports["postgres"]
    user = "postgres" if os.geteuid() == 0 else None
    if not data.exists():
        data.mkdir(mode=0o700)
        if user:
            os.chown(data, pwd.getpwnam(user).pw_uid, pwd.getpwnam(user).pw_gid)
        command = [bin_ / "initdb", "-D", data, "-U", "prefect", "--auth=trust", "--encoding=UTF8", "--no-sync"]
        done = subprocess.run(
            [str(w) for w in command], user=user, cwd="/", capture_output=True, text=True, check=False
        )
        if done.returncode:
            data.rmdir()
            print(f"PostgreSQL cannot be used ({done.stderr.strip().splitlines()[-1]}): SQLite instead")
            return
    console.start(
        "postgres", bin_ / "postgres", "-D", data, "-p", port, "-h", "127.0.0.1", "-k", "", "-c", "fsync=off", user=user
    )  # fmt: skip
    console.wait("postgres", lambda: _listens(port))
    url = f"postgresql+asyncpg://prefect@127.0.0.1:{port}/postgres"
    console.environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = url


def _server(console: Console) -> None:
    port = console.ports["prefect"]
    console.environment |= {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
    }
    console.start("prefect", BIN / "prefect", "server", "start", "--host", "127.0.0.1", "--port", port)
    console.wait("prefect", lambda: _answers(f"{console.environment['PREFECT_API_URL']}/health"))


def _ray(console: Console) -> None:
    port = console.ports["ray"]
    console.environment |= {
        "RAY_AUTH_MODE": "token",  # some of its ports are on all interfaces, whatever it is told
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # no traffic to drain; its own idle actors would take 30 s
        "RAY_ADDRESS": f"127.0.0.1:{port}",
    }
    address = (
        "--node-ip-address", "127.0.0.1", "--port", port, "--metrics-export-port", console.ports["metrics"],
        "--dashboard-host", "127.0.0.1", "--dashboard-port", console.ports["dashboard"],
        "--dashboard-agent-listen-port", 0,  # the usual one may be another Ray's: this one would then take no jobs
    )  # fmt: skip
    console.start("ray", BIN / "ray", "start", "--head", "--block", "--disable-usage-stats", *address)
    jobs = f"http://127.0.0.1:{console.ports['dashboard']}/api/jobs/"
    token = {"Authorization": f"Bearer {console.environment['RAY_AUTH_TOKEN']}"}
    console.wait("ray", lambda: _listens(port) and _answers(jobs, token))


def _deployments(console: Console) -> None:
    prefect = BIN / "prefect"
    console.run(prefect, "work-pool", "create", POOL, "--type", "process", "--overwrite")
    print("registering the deployments")
    console.run(prefect, "--no-prompt", "deploy", "--all", "--prefect-file", ROOT / "infra" / "prefect.yaml")
    worker(console)


def worker(console: Console) -> None:
    """Start the worker that runs deployments, and wait until the server has heard of it."""
    console.start("worker", BIN / "prefect", "worker", "start", "--pool", POOL, "--name", "worker")
    workers = (BIN / "prefect", "work-pool", "inspect", POOL)
    console.wait("worker", lambda: "READY" in console.run(*workers))


def _port(wanted: int) -> int:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def _answers(url: str, headers: dict[str, str] | None = None) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers or {}), timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _since(pid: int) -> str:
    """When a process started, in ticks since boot; "" when it is gone or a zombie."""
    stat = _stat(pid)
    return stat[19] if stat and stat[0] != "Z" else ""


def _send(pid: int, number: signal.Signals) -> None:
    """A signal, to a process that may have ended since it was seen."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _session(leader: int) -> list[int]:
    """The processes of a session that are still there."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [pid for pid in pids if (stat := _stat(pid)) and int(stat[3]) == leader and stat[0] != "Z"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("up", "down"))
    parser.add_argument("--home", type=Path, default=ROOT / ".console", help="where state, data and logs lie")
    options = parser.parse_args()
    home = options.home.absolute()
    if options.what == "down":
        down(home)
        return
    try:
        console = up(home)
    except RuntimeError as error:
        sys.exit(f"make up: {error}")
    exports = [f"export {name}={value}" for name, value in console.environment.items()]
    (home / "environment").touch(mode=0o600)
    (home / "environment").write_text("\n".join(exports) + "\n")
    print(
        f"""
Prefect    http://127.0.0.1:{console.ports["prefect"]}   (deployments restore/gopro, restore/folder, ...)
S3         {console.environment["AWS_ENDPOINT_URL"]}   bucket s3://{BUCKET}
keys       {home}/environment, of S3 and Ray
Ray        {console.environment["RAY_ADDRESS"]}   dashboard and jobs http://127.0.0.1:{console.ports["dashboard"]}
logs       {home}/*.log

  source {home}/environment
  prefect deployment run restore/folder --watch
  prefect deployment run restore/gopro --param checkpoint=demo --watch"""
    )


if __name__ == "__main__":
    main()
