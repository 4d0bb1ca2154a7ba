"""The `sparsekv` command in a real terminal: prompts, Ctrl-C and Ctrl-D, and the exit codes that a shell sees."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sparsekv.evaluation import testbed

pexpect = pytest.importorskip("pexpect")
pytestmark = [
    pytest.mark.wide,
    pytest.mark.skipif(sys.platform == "win32", reason="pexpect needs a Unix terminal"),
]

START_SECONDS = 120  # on a busy machine; it takes about six
STORY = testbed.make_story(1024, tasks=("needle", "many_keys"), num_questions=2, seed=0)
ASKED = [q.prompt.removeprefix("Question : ").removesuffix(" Answer :") for q in STORY.questions]
SPARSEKV = f"{sys.executable} -m sparsekv.cli"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TERM": "xterm"}
Start = Callable[[str], Any]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts lines of a shell in a terminal, in a folder with a story; those that still run at the end are ended."""
    (tmp_path / "story.txt").write_text(STORY.text)
    started: list[Any] = []

    def in_terminal(line: str) -> Any:
        child = pexpect.spawn(
            "bash", ["-c", line], timeout=START_SECONDS, encoding="utf-8", dimensions=(40, 200), cwd=str(tmp_path),
            env={**ENVIRONMENT, "SPARSEKV_CACHE_DIR": str(tmp_path)},
        )  # fmt: skip
        started.append(child)
        return child

    yield in_terminal
    for child in started:
        child.close(force=True)


def code_of(child: Any) -> int:
    """Of a program that comes to its end by itself."""
    child.expect(pexpect.EOF)
    child.close()
    assert child.signalstatus is None, f"ended by signal {child.signalstatus}"
    code: int = child.exitstatus
    return code


def ask(child: Any, line: str, *expected: str) -> None:
    """Types a line at the prompt, and waits for what must follow and for the next prompt."""
    child.sendline(line)
    for text in (*expected, "> "):
        child.expect_exact(text)


def test_a_conversation_from_the_first_prompt_to_ctrl_d(start: Start) -> None:
    child = start(f"exec {SPARSEKV} chat --document story.txt --budget 128")
    for text in ("1,024 tokens read.", "/help lists", "> "):
        child.expect_exact(text)
    child.sendline(ASKED[0])
    child.expect_exact(STORY.questions[0].answer)
    child.expect(r"\[6 tokens, (\d+\.\d)% of the cache read per token, (1,\d\d\d) tokens in the cache, \d+\.\d ms")
    assert float(child.match[1]) < 60
    child.expect_exact("> ")
    ask(child, "/rset", "Did you mean '/reset'")  # in a terminal nothing is lost by it
    ask(child, "/reset", "All questions are forgotten.")
    ask(child, "/stats", "PagedCache(1 sequences, 1024 tokens")
    ask(child, ASKED[1], STORY.questions[1].answer, "tokens in the cache")
    child.sendeof()
    assert code_of(child) == 0


def test_ctrl_c_stops_an_answer_and_at_the_prompt_ends_the_chat(start: Start) -> None:
    """Asked in words that it has not learned, the small model goes on and on."""
    model = f"--model {testbed.MODEL_DIR} --dtype float32 --plain --max-new-tokens 30000"
    child = start(f"exec {SPARSEKV} chat --document story.txt {model}")
    child.expect_exact("/help lists")
    child.expect_exact("> ")
    child.sendline("go on")
    child.expect(r"\w+ \w+ \w+ \w+ \w+ \w+ \w+ \w+")
    child.sendintr()
    child.expect_exact("[stopped; the question is forgotten]")
    child.expect_exact("> ")
    ask(child, "/stats", "PagedCache(1 sequences, 1024 tokens")  # no half a turn
    child.sendintr()
    child.expect_exact("sparsekv: interrupted")
    assert code_of(child) == 130


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        ("generate --model no/such/model --prompt x", 1, "--model no/such/model: there is no folder"),
        ("--help | echo closed", 0, "closed"),
    ],
)
def test_the_shell_sees_the_exit_code(arguments: str, code: int, told: str, start: Start) -> None:
    child = start(f"set -o pipefail; {SPARSEKV} {arguments}")
    child.expect_exact(told)
    assert code_of(child) == code
    assert "Traceback" not in child.before


def test_json_is_all_there_is_on_standard_output(tmp_path: Path) -> None:
    """From a process of its own: whatever a library prints by itself would show here."""
    line = f"{SPARSEKV} generate --model testbed --prompt 'the secret code' --json --max-new-tokens 4 --device cpu"
    done = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=START_SECONDS,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["new_tokens"] == 4
