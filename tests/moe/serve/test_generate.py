import io

import pytest

from moe.serve.generate import main


def test_a_prompt_is_continued(checkpoint, model, capsys):
    assert main([str(checkpoint), "--prompt", "In the", "--max-tokens", "9"]) == 0
    told = capsys.readouterr()
    assert told.out == "In the" + model.generate("In the", max_tokens=9) + "\n"
    assert "tokens/s]" in told.err


def test_the_prompt_may_come_on_standard_input(checkpoint, model, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("In"))
    assert main([str(checkpoint), "--max-tokens", "3", "--temperature", "1", "--seed", "2"]) == 0
    expected = model.generate("In", max_tokens=3, temperature=1.0, seed=2)
    assert capsys.readouterr().out == f"In{expected}\n"


def test_a_conversation_remembers(checkpoint, model, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\nand then?\n\n"))
    assert main([str(checkpoint), "--chat", "--system", "be brief", "--max-tokens", "6"]) == 0
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    first = model.chat(messages, max_tokens=6)
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "and then?"}]
    assert capsys.readouterr().out == f"you> {first}\nyou> {model.chat(messages, max_tokens=6)}\nyou> "


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--prompt", "a"], "nowhere: no such folder"),
        (["MODEL", "--prompt", ""], "the prompt has no tokens"),
        (["MODEL", "--prompt", "a", "--top-p", "2"], "top_p=2.0: give a number"),
        (["MODEL", "--prompt", "a", "--mesh", "expert=3"], "does not divide"),
        (["MODEL", "--prompt", "a", "--mesh", "wing=3"], "no axis is called 'wing'"),
    ],
)
def test_mistakes_are_named(checkpoint, arguments, message, capsys):
    assert main([str(checkpoint) if each == "MODEL" else each for each in arguments]) == 2
    assert message in capsys.readouterr().err
