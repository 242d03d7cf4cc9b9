"""The pinned dependencies against PyPI's known vulnerabilities. Ends with 1 when one of them has any.

A mirror that knows of none leaves them unaudited, which is said and is no failure.
"""

import json
import subprocess
import sys
from pathlib import Path

PINS = Path(__file__).with_name("constraints.txt")


def main() -> None:
    command = ["-m", "pip_audit", "--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
    done = subprocess.run(
        [sys.executable, *command, "--requirement", PINS], capture_output=True, text=True, check=False
    )
    try:
        found = json.loads(done.stdout)["dependencies"]
    except ValueError:
        if "ConnectionError" not in done.stderr:
            sys.exit(f"audit: {done.stderr}")
        print(f"audit: not one package, the registry cannot be reached: {done.stderr.strip().splitlines()[-1]}")
        return
    skipped = [one["name"] for one in found if "skip_reason" in one]
    bad = [one for one in found if one.get("vulns")]
    for one in bad:
        for known in one["vulns"]:
            fixed = ", ".join(known["fix_versions"]) or "no version"
            print(f"{one['name']} {one['version']}: {known['id']}, mended in {fixed}")
    unknown = f", {len(skipped)} unknown to the registry" if skipped else ""
    print(f"audit: {len(found) - len(skipped)} of {len(found)} pinned packages{unknown}, {len(bad)} vulnerable")
    sys.exit(bool(bad))


main()
