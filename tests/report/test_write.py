import csv
import io
import json
import os
from html.parser import HTMLParser
from pathlib import Path

from tests.report.synthetic import Study, make
from zexp.report import build, print_tables, write
from zexp.report.templates import environment
from zexp.store.files import read_json, write_json


class Links(HTMLParser):
    """Every address that a page names, and every id that it has."""

    def __init__(self):
        super().__init__()
        self.addresses, self.ids = [], set()

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("href", "src"):
                self.addresses.append(value)
            if name == "id":
                assert value not in self.ids
                self.ids.add(value)


def test_all_five_files_lie_in_the_studys_folder(finished):
    paths = write(build(finished.root, "invented"))
    assert set(paths) == {"html", "json", "md", "csv", "tex"}
    folder = finished.root / "studies" / "invented" / "report"
    assert sorted(os.listdir(folder)) == sorted(f"leaderboard.{suffix}" for suffix in paths)
    assert json.loads(paths["json"].read_text())["study"] == "invented"


def test_the_tables_have_a_line_a_row(finished):
    report = build(finished.root, "invented")
    paths = write(report)
    lines = list(csv.DictReader(io.StringIO(paths["csv"].read_text())))
    assert {line["variant"] for line in lines} == {row.name for row in report.rows}
    best = report.ranked()[0]
    assert float(lines[0]["bpb_high_quality/bits_per_byte mean"]) == best.metrics[report.metric].mean
    markdown = paths["md"].read_text()
    widths = {line.count(" |") for line in markdown.splitlines() if line.startswith("| ") and "@" in line}
    assert widths == {len(report.metric_names) + 6}
    assert "cannot distinguish" in markdown
    latex = paths["tex"].read_text()
    assert r"zamba2\_tiny,replay60" in latex
    assert latex.count(r" \\") == len(report.rows) + 1


def test_failures_are_in_every_text(tmp_path):
    store = make(
        Study(
            tmp_path / "store", archs=("zamba2_tiny",),
            outcome=lambda s: "failed" if s["label"].endswith("replay60") else "done",
        )
    )  # fmt: skip
    for suffix, path in write(build(store.root, "invented")).items():
        text = path.read_text()
        assert "failed" in text, suffix
        if suffix in ("html", "md", "json"):
            assert "out of imaginary memory" in text
            assert "attempts/1/log" in text


def test_a_report_of_an_untouched_study_can_be_written(tmp_path):
    store = make(Study(tmp_path / "store", archs=("zamba2_tiny",), outcome=lambda s: "missing"))
    page = write(build(store.root, "invented"))["html"].read_text()
    assert "Nothing has been trained yet" in page
    assert "No comparison can be made yet" in page


def test_every_link_of_the_page_leads_somewhere(finished):
    path = write(build(finished.root, "invented"))["html"]
    links = Links()
    links.feed(path.read_text())
    for address in links.addresses:
        if address.startswith("#"):
            assert address[1:] in links.ids, address
        elif not address.startswith("data:"):
            assert (path.parent / address).exists(), address
    assert sum(address.startswith("#stage-") for address in links.addresses) > 20


def test_names_cannot_break_the_page_or_the_tables(tmp_path):
    store = make(Study(tmp_path / "store", archs=("zamba2_tiny",)))
    path = store.study("invented") / "variants.json"
    listed = read_json(path)
    listed["study"]["question"] = "</script><b>50 % & more_or | less?"
    write_json(path, listed)
    paths = write(build(store.root, "invented"))
    assert "</script><b>50" not in paths["html"].read_text()
    assert r"50 \% \& more\_or" in paths["tex"].read_text()
    assert environment("markdown").from_string("{{ x }}").render(x="a|b") == r"a\|b"


def test_the_terminal_shows_scores_verdicts_and_cautions(finished):
    from rich.console import Console

    console = Console(width=200, file=io.StringIO(), record=True)
    print_tables(build(finished.root, "invented"), console)
    text = console.export_text()
    assert "Does an invented arm beat an invented control?" in text
    assert "zamba2_tiny,replay60 against zamba2_tiny,control" in text
    assert "Arms share a pretraining seed" in text


def test_writing_twice_gives_the_same_bytes(finished, tmp_path):
    texts = [
        {suffix: path.read_bytes() for suffix, path in write(build(finished.root, "invented"), folder).items()}
        for folder in (Path(tmp_path / "x"), Path(tmp_path / "x"))
    ]
    assert texts[0] == texts[1]
