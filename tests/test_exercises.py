"""The exercises can be solved, and are not solved: their tests pass on the solutions alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def outcomes(**environment):
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "--tb=no", "-p", "no:cacheprovider",
               "exercises/test_exercises.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment,
                          timeout=300)
    return {word: done.stdout.count(f"\n{word} ") for word in ("PASSED", "FAILED", "ERROR")}


@pytest.mark.slow
def test_every_solution_turns_its_exercise_green_and_nothing_else_does():
    assert outcomes(EXERCISES="solutions") == {"PASSED": 10, "FAILED": 0, "ERROR": 0}
    assert outcomes(EXERCISES=".") == {"PASSED": 0, "FAILED": 10, "ERROR": 0}
