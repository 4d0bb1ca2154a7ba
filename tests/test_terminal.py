"""The `sparsekv` command in a real terminal: prompts, Ctrl-C and Ctrl-D, and the exit codes that a shell sees."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
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
STORY = testbed.make_story(2048, tasks=("needle", "many_keys"), num_questions=2, seed=0)
SPARSEKV = [sys.executable, "-m", "sparsekv.cli"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TERM": "xterm"}


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("terminal") / "story.txt"
    path.write_text(STORY.text)
    return str(path)


@pytest.fixture
def terminals() -> Iterator[list[Any]]:
    """Programs started in terminals; those that still run at the end are ended."""
    started: list[Any] = []
    yield started
    for child in started:
        child.close(force=True)


def in_terminal(terminals: list[Any], *arguments: str) -> Any:
    child = pexpect.spawn(
        SPARSEKV[0], [*SPARSEKV[1:], *arguments], timeout=START_SECONDS, encoding="utf-8", env=ENVIRONMENT,
        dimensions=(40, 200),
    )  # fmt: skip
    terminals.append(child)
    return child


def code_of(child: Any) -> int:
    """Of a program that comes to its end by itself."""
    child.expect(pexpect.EOF)
    child.close()
    assert child.signalstatus is None, f"ended by signal {child.signalstatus}"
    code: int = child.exitstatus
    return code


def typed(number: int) -> str:
    return STORY.questions[number].prompt.removeprefix("Question : ").removesuffix(" Answer :")


def ask(child: Any, line: str, *expected: str) -> None:
    """Types a line at the prompt, and waits for what must follow and for the next prompt."""
    child.sendline(line)
    for text in expected:
        child.expect_exact(text)
    child.expect_exact("> ")


def test_a_conversation_from_the_first_prompt_to_ctrl_d(story: str, terminals: list[Any]) -> None:
    child = in_terminal(terminals, "chat", "--document", story, "--budget", "256")
    child.expect_exact("2,048 tokens read.")
    child.expect_exact("/help lists")
    child.expect_exact("> ")
    for i, question in enumerate(STORY.questions):
        child.sendline(typed(i))
        child.expect_exact(question.answer)
        child.expect(
            r"\[6 tokens, (\d+\.\d)% of the cache read per token, (2,\d\d\d) tokens in the cache, \d+\.\d ms"
        )
        assert float(child.match[1]) < 50
        child.expect_exact("> ")
    ask(child, "/rset", "Did you mean '/reset'")  # in a terminal nothing is lost by it
    ask(child, "/reset", "All questions are forgotten.")
    ask(child, "/stats", "PagedCache(1 sequences, 2048 tokens")
    ask(child, typed(1), STORY.questions[1].answer, "tokens in the cache")
    child.sendeof()
    assert code_of(child) == 0


def test_ctrl_c_stops_an_answer_and_at_the_prompt_ends_the_chat(story: str, terminals: list[Any]) -> None:
    """Asked in words that it has not learned, the small model goes on and on."""
    child = in_terminal(
        terminals, "chat", "--document", story, "--model", str(testbed.MODEL_DIR), "--dtype", "float32", "--plain",
        "--max-new-tokens", "30000",
    )  # fmt: skip
    child.expect_exact("/help lists")
    child.expect_exact("> ")
    child.sendline("go on")
    child.expect(r"\w+ \w+ \w+ \w+ \w+ \w+ \w+ \w+")
    child.sendintr()
    child.expect_exact("[stopped; the question is forgotten]")
    child.expect_exact("> ")
    ask(child, "/stats", "PagedCache(1 sequences, 2048 tokens")  # no half a turn
    child.sendintr()
    child.expect_exact("sparsekv: interrupted")
    assert code_of(child) == 130


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        ("genrate", 2, "Did you mean 'generate'"),
        ("generate --model no/such/model --prompt x", 1, "--model no/such/model: there is no folder"),
        ("doctor | echo closed", 0, "closed"),
        ("--help | echo closed", 0, "closed"),
    ],
)
def test_the_shell_sees_the_exit_code(arguments: str, code: int, told: str, terminals: list[Any]) -> None:
    line = f"set -o pipefail; {sys.executable} -m sparsekv.cli {arguments}"
    child = pexpect.spawn(
        "bash", ["-c", line], timeout=START_SECONDS, encoding="utf-8", env=ENVIRONMENT, dimensions=(40, 200)
    )
    terminals.append(child)
    child.expect_exact(told)
    assert code_of(child) == code
    assert "Traceback" not in child.before


def test_json_is_all_there_is_on_standard_output(tmp_path: Path) -> None:
    """From a process of its own: whatever a library prints by itself would show here."""
    command = [*SPARSEKV, "generate", "--model", "testbed", "--prompt", "the secret code", "--json"]
    done = subprocess.run(
        [*command, "--max-new-tokens", "4", "--device", "cpu"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True,
        text=True, timeout=START_SECONDS, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["new_tokens"] == 4


def test_an_interrupted_command_exits_with_130(tmp_path: Path, terminals: list[Any]) -> None:
    child = in_terminal(terminals, "bench", "--device", "cpu", "--contexts", "256k", "--repeats", "1000")
    child.expect_exact("Measuring")
    child.kill(signal.SIGINT)
    child.expect_exact("sparsekv: interrupted")
    assert code_of(child) == 130
