"""The examples reach in their short form what they state."""

import pytest
from scripts import ROOT, numbers, run


SCRIPTS = ROOT / "examples"

# model, update, accuracy, cosine with BPTT before training.
# Ten epochs give 0.89 to 0.91, cosines of 0.988 and more (three seeds).
DIGITS = [
    pytest.param("gru", "sequence", 0.85, 0.97, marks=pytest.mark.long),
    pytest.param("lif", "sequence", 0.85, 0.97, marks=pytest.mark.long),
    pytest.param("lif", "step", 0.85, 0.97, marks=pytest.mark.long),
]


LONGER = {SCRIPTS / name for name in ("digits.py", "processes.py")}
SHORT = sorted(set(SCRIPTS.glob("*.py")) - LONGER)


@pytest.mark.parametrize("script", SHORT, ids=lambda script: script.stem)
def test_examples_are_short(script):
    text = script.read_text()
    assert len(text.splitlines()) <= 150
    assert "--quick" in text and f"python examples/{script.name}" in text


@pytest.mark.slow
@pytest.mark.parametrize("model, update, accuracy, cosine", DIGITS)
def test_digits(tmp_path, model, update, accuracy, cosine):
    figure = tmp_path / "digits.png"
    text = run(
        "digits.py",
        "--quick",
        *("--model", model, "--update", update, "--figure", str(figure)),
    )

    (reached,) = numbers(r"test accuracy: (\S+)", text)
    assert reached > accuracy
    before, _ = numbers(r"(\S+) before training, (\S+) after", text)
    assert before > cosine

    online, bptt = numbers(r"\b64 steps +(\S+) MiB +(\S+) MiB", text)
    longer_online, longer_bptt = numbers(r"640 steps +(\S+) MiB +(\S+) MiB", text)
    assert longer_online < 1.1 * online
    assert longer_bptt > 5 * bptt
    assert online < bptt

    assert figure.read_bytes().startswith(b"\x89PNG")
