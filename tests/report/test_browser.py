"""The page in a headless Chromium: no errors, no requests, and what can be clicked works."""

import json
import shutil

import pytest

from zexp.report import build, write

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (pip install -e '.[dev]')")

BROWSER = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
DRIVER = shutil.which("chromedriver")
if BROWSER is None or DRIVER is None:
    pytest.skip(
        "no Chromium with its driver on this machine (Debian: apt-get install chromium chromium-driver)",
        allow_module_level=True,
    )

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run", "--window-size=1300,1000",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = BROWSER
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def requests_of(browser):
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in sent if not url.startswith("data:")]


def test_the_page_opens_from_a_file_without_errors_or_requests(browser, finished):
    path = write(build(finished.root, "invented"))["html"]
    browser.get_log("performance")
    browser.get(path.as_uri())
    assert browser.title == "invented · leaderboard"
    assert len(browser.find_elements("css selector", "#board tbody tr")) == 6
    assert len(browser.find_elements("css selector", "#loss path.series")) == 8  # 2 x (trunk, decay, 2 arms)
    assert len(browser.find_elements("css selector", "#lr path.series")) == 8
    assert len(browser.find_elements("css selector", ".trajectory.shared")) == 4
    browser.find_element("id", "theme").click()
    assert browser.get_log("browser") == []
    assert requests_of(browser) == [path.as_uri()]


def test_a_click_on_a_heading_sorts_best_first_then_worst_first(browser, finished):
    browser.get(write(build(finished.root, "invented"))["html"].as_uri())

    def accuracies():
        cells = browser.find_elements("css selector", "#board tbody tr td:last-child")
        return [float(cell.get_attribute("data-value")) for cell in cells]

    heading = browser.find_element("css selector", "#board thead th:last-child")
    assert "cloze" in heading.text
    heading.click()
    assert accuracies() == sorted(accuracies(), reverse=True)
    heading.click()
    assert accuracies() == sorted(accuracies())


def test_a_score_leads_to_its_stage(browser, finished):
    browser.get(write(build(finished.root, "invented"))["html"].as_uri())
    browser.find_element("css selector", "#board .score a").click()
    target = browser.find_element("css selector", "#stages tr:target")
    assert target.is_displayed()
    assert "eval" in target.text


def test_the_legend_hides_and_the_colours_follow_an_axis(browser, finished):
    from selenium.webdriver.support.ui import Select

    browser.get(write(build(finished.root, "invented"))["html"].as_uri())
    browser.find_element("css selector", "#legend button").click()
    assert len(browser.find_elements("css selector", "#loss path.series")) == 4
    Select(browser.find_element("id", "colour")).select_by_visible_text("arm")
    labels = [button.text for button in browser.find_elements("css selector", "#legend button")]
    assert labels == ["● control", "● replay60", "● several (shared)"]
    assert browser.get_log("browser") == []


def test_a_page_of_failures_and_of_nothing_at_all_has_no_errors(browser, tmp_path):
    from tests.report.synthetic import Study, make

    for name, outcome in {"broken": "diverged", "empty": "missing"}.items():
        store = make(
            Study(
                tmp_path / name, archs=("zamba2_tiny",),
                outcome=lambda s, outcome=outcome: outcome if s["kind"] == "segment" and not s["from"] else "done",
            )
        )  # fmt: skip
        browser.get(write(build(store.root, "invented"))["html"].as_uri())
        assert len(browser.find_elements("css selector", "#unfinished tbody tr")) == 3
        assert browser.get_log("browser") == []
