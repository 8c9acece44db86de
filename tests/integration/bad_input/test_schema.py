"""The OpenAPI schema, and a server that keeps to it: schemathesis tries to find a difference.

``SCHEMATHESIS_EXAMPLES`` says how many requests it may try for each route, for a longer search.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serverprocess import ServerProcess

EXAMPLES = os.environ.get("SCHEMATHESIS_EXAMPLES", "20")
REPLACED = "positive_data_acceptance,negative_data_rejection"  # by our own, see schema_checks


@pytest.mark.timeout(max(300, int(EXAMPLES) * 10))
def test_the_server_keeps_to_its_schema(tmp_path: Path) -> None:
    """Whatever fits is accepted, what does not is refused, and every answer is as documented."""
    with ServerProcess(tmp_path, STORE_URL="memory://", MODEL_PROVIDER="demo", OVERLOAD_LAG_MS="0") as server:
        command = [
            str(Path(sys.executable).with_name("schemathesis")),
            *(
                "run",
                f"{server.url}/openapi.json",
                "--max-examples",
                EXAMPLES,
                "--mode",
                "all",
                "--seed",
                "1",
            ),
            *("--checks", "all", "--exclude-checks", REPLACED, "--continue-on-failure", "--no-color"),
        ]
        hooks = {"SCHEMATHESIS_HOOKS": "tests.integration.bad_input.schema_checks"}
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | hooks, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Traceback" not in server.log()
