"""File systems of a test's own, which are as small as it wants them."""

import json
import os
import subprocess
import sys
import textwrap


def can_mount():
    """Whether a small file system of our own can be had, without being asked who we are."""
    try:
        command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def on_a_small_disk(tmp_path, options, script, **settings):
    """What a script prints, line by line, as JSON, of a file system of its own, whose content is copied."""
    small = tmp_path / "small"
    small.mkdir()
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    command = f"""
        mount -t tmpfs -o {options} tmpfs {small} &&
        {sys.executable} {tmp_path}/script.py {small} '{json.dumps(settings, default=str)}' &&
        cp -r {small} {tmp_path}/copy
    """
    answer = subprocess.run(
        ["unshare", "-rm", "sh", "-c", textwrap.dedent(command)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert answer.returncode == 0, answer.stderr
    return [json.loads(line) for line in answer.stdout.splitlines()]
