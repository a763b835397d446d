"""Which documents there are, on which side each is, and what is dropped."""

import hashlib

import pytest

from tests.data.conftest import write_lines
from zexp.data import embedded
from zexp.data.documents import Tally, documents, is_heldout, sample
from zexp.store.errors import StoreError

FILES = {
    f"numpy/pack/m{n}.py": f'"""Module {n}."""\n\ndef f{n}(a):\n    """Do {n}."""\n    return {n}\n' for n in range(40)
}


def side(text):
    return is_heldout(hashlib.sha256(text.encode()).digest(), 0.3)


def test_a_file_is_on_the_same_side_in_both_views(packages, source, tmp_path):
    packages(FILES)
    sides = {}
    for view in ("base", "high_quality"):
        made = source(kind="embedded", view=view, packages=["numpy"])
        found = list(documents(made, 0.3, directory=tmp_path))
        sides[view] = {document.file: document.heldout for document in found}
        assert sides[view] == {name: side(text) for name, text in FILES.items()}
        assert len(found) == len(FILES) * (1 if view == "base" else 2)
        assert [d.heldout for d in found] == sorted(d.heldout for d in found)  # training first
    assert 2 < sum(sides["base"].values()) < 25


def test_the_views_share_out_the_text(packages, source, tmp_path):
    packages({"numpy/__init__.py": "'Top.'\n", "numpy/a.py": FILES["numpy/pack/m0.py"]})
    base = list(documents(source(kind="embedded", view="base", packages=["numpy"]), 0, directory=tmp_path))
    assert [(d.file, d.text) for d in base] == [("numpy/a.py", "\ndef f0(a):\n    return 0\n")]
    high = list(documents(source(kind="embedded", view="high_quality", packages=["numpy"]), 0, directory=tmp_path))
    assert [(d.symbol, d.name, d.text, d.signature, d.docstring) for d in high] == [
        ("module", "numpy", "import numpy\nTop.\n", "import numpy", "Top.\n"),
        ("module", "numpy.a", "import numpy.a\nModule 0.\n", "import numpy.a", "Module 0.\n"),
        ("function", "numpy.a.f0", "def f0(a):\nDo 0.\n", "def f0(a):", "Do 0.\n"),
    ]


def test_a_docstring_that_is_in_two_files_trains_and_is_not_scored(packages, source, tmp_path):
    copies = {f"numpy/c{n}.py": f'def g{n}():\n    """The same."""\n' for n in range(40)}
    packages(copies)
    made = source(kind="embedded", view="high_quality", packages=["numpy"])
    tally = Tally()
    found = list(documents(made, 0.3, directory=tmp_path, tally=tally))
    assert any(side(text) for text in copies.values())
    assert [d.heldout for d in found] == [False]
    assert tally.duplicates == 39
    assert list(documents(made, 0.3, directory=tmp_path, part="heldout")) == []


def test_what_cannot_be_read_is_counted_and_named(packages, source, tmp_path):
    packages({"numpy/bad.py": "print 'two'\n", "numpy/latin.py": b"#\n#\nx = '\xe4'\n", "numpy/nul.py": b"\0",
              "numpy/good.py": "x = 1\n"})
    tally = Tally()
    made = source(kind="embedded", view="base", packages=["numpy"])
    assert [d.file for d in documents(made, 0, directory=tmp_path, tally=tally)] == ["numpy/good.py"]
    assert [error["file"] for error in tally.errors] == ["numpy/bad.py", "numpy/latin.py", "numpy/nul.py"]
    assert tally.errors[0]["error"].startswith("SyntaxError: Missing parentheses in call to 'print'")


def test_tests_and_what_others_installed_are_left_out(packages):
    packages({f"stdlib/{name}/x.py": "" for name in ("json", "test", "site-packages", "a/tests", "config-3.11-linux")})
    packages({"stdlib/_sysconfigdata__linux.py": "", "stdlib/os.py": "", "stdlib/data.txt": ""})
    assert [file.name for file in embedded.files("stdlib")] == ["stdlib/json/x.py", "stdlib/os.py"]


def test_topics_are_split_one_by_one(packages, source, tmp_path):
    topics = {f"topic{n}": f"\nText {n}.\n" for n in range(50)}
    packages({"topics/topics.py": f"# made\ntopics = {topics!r}\n"})
    made = source(kind="embedded", view="high_quality", packages=["topics"])
    found = list(documents(made, 0.3, directory=tmp_path))
    assert {d.name: d.heldout for d in found} == {name: side(text.strip()) for name, text in topics.items()}
    assert 3 < sum(d.heldout for d in found) < 30
    assert min(found, key=lambda d: d.name).text == "help('topic0')\nText 0.\n"


def test_changed_packages_are_not_read_under_the_old_name(packages, source, tmp_path):
    packages({"numpy/a.py": "x = 1\n"})
    made = source(kind="embedded", view="base", packages=["numpy"])
    packages({"numpy/a.py": "x = 2\n"})
    with pytest.raises(StoreError, match="are no longer those that were planned with"):
        list(documents(made, 0, directory=tmp_path))


def test_changed_and_missing_files_are_not_read_under_the_old_name(source, tmp_path):
    write_lines(tmp_path / "a.txt", ["one"])
    made = source(kind="text", files="a.txt")
    write_lines(tmp_path / "a.txt", ["two"])
    with pytest.raises(StoreError, match=r"a\.txt is no longer the file"):
        list(documents(made, 0, directory=tmp_path))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(StoreError, match=r"a\.txt is no longer the file"):
        list(documents(made, 0, directory=tmp_path))


def test_a_files_documents_are_split_one_by_one_and_counted_once(source, tmp_path):
    lines = [f"line {n}" for n in range(100)]
    write_lines(tmp_path / "a.txt", [*lines, *lines[:10]])
    tally = Tally()
    made = source(kind="text", files="a.txt", documents="line")
    found = list(documents(made, 0.3, directory=tmp_path, tally=tally))
    assert {d.text: d.heldout for d in found} == {line: side(line) for line in lines}
    assert tally.duplicates == 10
    held = list(documents(made, 0.3, directory=tmp_path, part="heldout"))
    assert held == [d for d in found if d.heldout]
    assert {d.text for d in documents(made, 0.1, directory=tmp_path, part="heldout")} <= {d.text for d in held}


def test_a_sample_is_of_training_text_in_the_order_of_hashes(source, tmp_path, packages):
    lines = [f"line {n:03}" for n in range(300)]
    write_lines(tmp_path / "a.txt", lines)
    write_lines(tmp_path / "b.txt", lines[::-1])
    taken = [
        list(sample(source(kind="text", files=f"{name}.txt", documents="line"), 0.3, 400, directory=tmp_path))
        for name in "ab"
    ]
    assert taken[0] == taken[1]  # not the first lines: any order of the file gives the same ones
    assert len(taken[0]) == 50
    assert not any(side(text) for text in taken[0])

    packages(FILES)
    made = source(kind="embedded", view="base", packages=["numpy"])
    whole = list(sample(made, 0.3, 10**6, directory=tmp_path))
    assert sorted(whole) == sorted(d.text for d in documents(made, 0.3, directory=tmp_path, part="train"))
    some = list(sample(made, 0.3, 200, directory=tmp_path))
    assert some == whole[: len(some)]
    assert 200 <= sum(map(len, some)) < 250
