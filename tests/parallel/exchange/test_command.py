import pytest

from parallel.exchange.__main__ import main


def test_the_table(capsys):
    main(["--per-node", "4", "--buckets", "32", "--top-k", "4", "--tokens", "128"])
    table = [line.split() for line in capsys.readouterr().out.splitlines()[4:]]
    inside, across = (
        {name: float(row[column]) for name, wire, *row in table if wire == "bfloat16"} for column in (0, 1)
    )
    shorter = {name: float(row[1]) for name, wire, *row in table if wire == "fp8"}
    assert set(shorter) == set(across) - {"least"}
    for name, sent in shorter.items():
        # A byte a number and one for every 32, and the tables.
        assert sent == pytest.approx(33 / 64 * across[name], rel=0.03), name
    assert across["least"] < across["ragged_hierarchical"] < across["hierarchical"] < across["ragged"]
    assert across["ragged"] < across["padded"] <= across["gathered"]
    assert inside["least"] < inside["ragged_hierarchical"] < inside["hierarchical"] < inside["padded"]


@pytest.mark.parametrize(("given", "message"), [("--devices 6 --per-node 4", "multiple of 4"), ("--buckets 12", "8")])
def test_sizes_that_do_not_fit(given, message, capsys):
    with pytest.raises(SystemExit):
        main(given.split())
    assert message in capsys.readouterr().err
