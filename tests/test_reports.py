"""The report: complete, self-contained, small, and safe with hostile texts, in a real browser too where there is one."""
import base64
import hashlib
import html
import re
import shutil
import subprocess

import numpy as np
import pytest

from concept_tda.attribution import Attribution, AttributionError, Cost, QueryCard, compare
from concept_tda.conversations import Conversation, Conversations
from concept_tda.reports import write_report
from concept_tda.storage import StorageError
from test_attribution import HOSTILE, Reader, make

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
browser = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium on the PATH")


def chats(texts, name="train"):
    return Conversations([Conversation(({"role": "user", "content": f"q {text}"}, {"role": "assistant", "content": text}), metadata={"bad": i % 2 == 0, "note": text}) for i, text in enumerate(texts)], name)


def tokenized(data, seed=0, width=5):
    """Token arguments with made-up scores."""
    rng, texts = np.random.default_rng(seed), [re.findall(rf"(?s).{{1,{width}}}", c.prompt[0]["content"] + c.response) for c in data]
    return dict(tokens=texts, token_scores=[rng.normal(size=len(t)) for t in texts], response_masks=[np.arange(len(t)) > len(t) // 3 for t in texts])


def several(n=40, texts=None):
    """Three methods on the same examples, one with token scores."""
    data, rng = chats(texts or [f"an answer with the number {i}" for i in range(n)]), np.random.default_rng(0)
    card = lambda method: QueryCard(method, "sycophancy", model="tiny", model_fingerprint="feed", data="train", layer=3, notes=["one example was cut"], cost=Cost(2., 100))
    return [Attribution(data, rng.normal(size=len(data)), card("Concept Influence"), **tokenized(data)), Attribution(data, rng.normal(size=len(data)), card("BM25")),
            Attribution(data, rng.integers(1, 4, len(data)), card("Length"))]


def dump(page, tmp_path, *options):
    """The page's elements after a browser has opened it from a file."""
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000"]
    return subprocess.run([CHROMIUM, *flags, *options, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120, check=True).stdout


def test_the_report_shows_both_ends_of_every_method_with_their_numbers(tmp_path):
    results = several()
    page = write_report(results, tmp_path / "report.html", labels="bad", examples=4).read_text()
    sections = re.split(r'<section id="method-\d">', page)[1:]
    assert len(sections) == 3 and page.count("<article class='example'>") == 3 * 2 * 4
    for result, section in zip(results, sections):
        highest, lowest = section.split('<span class="n5">Lowest</span>')
        for part, end in ((highest, result.top(4)), (lowest, result.bottom(4))):
            assert re.findall(r"<span class='score'>([^<]+)<", part) == [f"{s:+.4g}" for s in end.scores]
            assert re.findall(r"row (\d+) · <code>", part) == [str(row) for row in end.rows]
            assert re.findall(r"rank (\d+) of 40", part) == [str(rank) for rank in end.ranks]
        assert "one example was cut" in section and "feed" in section and "<svg" in section
    first = results[0].top(1)
    assert f"rank by BM25: {results[1].ranks[first.rows[0]]}" in page and f"labelled: {'yes' if first.rows[0] % 2 == 0 else 'no'}" in page
    assert all(f"title='{score:+.3g}'" in sections[0] for score in first.token_scores[0])


def test_the_tables_are_those_of_compare(tmp_path):
    results = several()
    comparison = compare(results, labels="bad", k=(5,))
    for page in (write_report(results, tmp_path / "a.html", labels="bad", comparison=comparison).read_text(), write_report(comparison, tmp_path / "b.html").read_text()):
        cells = re.findall(r"<th scope='row' class='words'>([^<]+)</th><td[^>]*>([^<]+)</td>", page)
        assert dict(cells[:4]) == {name: f"{value:.3f}" for name, value in comparison.table["AUROC"].items()}
        assert dict(cells[4:7]) == {name: f"{value:.2f}" for name, value in comparison.spearman.iloc[:, 0].items()}
        assert "guessing (base rate)" in page


def test_every_example_is_in_the_table_in_order_with_all_ranks(tmp_path):
    results = several()
    body = write_report(results, tmp_path / "report.html", labels="bad").read_text().split('<table class="examples">')[1].split("</table>")[0]
    rows = [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", body, flags=re.S)[1:]]
    order = np.argsort(-results[0].scores)
    assert [row[:4] for row in rows] == [[str(i), *(str(result.ranks[i]) for result in results)] for i in order]
    assert [row[4] for row in rows] == ["yes" if i % 2 == 0 else "no" for i in order] and rows[0][5].endswith(f"the number {order[0]}")
    short = write_report(results, tmp_path / "short.html", rows=10).read_text()
    assert short.split('<table class="examples">')[1].count("<tr>") == 11 and "The 10 of 40 examples at the two ends" in short


def test_one_file_that_needs_nothing_else(tmp_path):
    page = write_report(several(), tmp_path / "report.html", labels="bad").read_text()
    assert not re.search(r"""(?:src|href|action|data)\s*=\s*["']?(?!#)[a-z/.]""", re.sub(r"<script>.*?</script>", "", page, flags=re.S).replace("data-", ""), flags=re.I)
    assert "@import" not in page and "url(" not in page and "//" not in re.sub(r"&#x2f;", "", re.sub(r"<pre>.*?</pre>", "", page, flags=re.S))
    targets, ids = set(re.findall(r'href="#([^"]+)"', page)), re.findall(r'id="([^"]+)"', page)
    assert targets <= set(ids) and len(ids) == len(set(ids)) and {"methods", "method-1", "method-3", "all", "again"} <= targets


def test_the_policy_admits_only_our_own_script(tmp_path):
    page = write_report(several(texts=HOSTILE), tmp_path / "report.html").read_text()
    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.S)
    assert len(scripts) == page.count("<script") == 1
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1]
    assert "default-src 'none'" in policy and "unsafe-inline" not in policy.split("script-src")[1].split(";")[0]
    assert base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode() in html.unescape(policy)


def test_hostile_texts_names_and_cards_stay_text(tmp_path):
    calm = {tag for tag in Reader(write_report(several(len(HOSTILE)), tmp_path / "calm.html", labels="bad").read_text()).tags}
    data = chats(HOSTILE, name=HOSTILE[0])
    results = {text: Attribution(data, np.arange(len(data)) + i + 1., QueryCard(text, text, model=text, notes=[text], settings={text: text}), **tokenized(data)) for i, text in enumerate(HOSTILE[:6])}
    page = write_report(results, tmp_path / "report.html", title=HOSTILE[0], labels="bad", examples=20).read_text()
    seen = Reader(page)
    assert seen.tags <= calm | {"bdi", "details"} and not [name for name in seen.attributes if name.startswith("on")] and "style" not in seen.attributes
    assert HOSTILE[0] in "".join(seen.text)


def test_labels_as_a_list_and_a_single_result(tmp_path):
    result = several()[0]
    page = write_report(result, tmp_path / "one.html", labels=[i < 10 for i in range(40)]).read_text()
    assert "Detection of the 10 labelled examples" in page and "side by side" not in page
    plain = result.report(tmp_path / "plain.html", title="Mine").read_text()
    assert "<title>Mine</title>" in plain and 'id="methods"' not in plain and 'href="#methods"' not in plain


def test_several_queries_become_several_sections(tmp_path):
    page = write_report(make(queries=3, tokens=True), tmp_path / "report.html").read_text()
    assert all(f"<h2>Concept Influence: concept {q}</h2>" in page for q in range(3)) and "Which training examples raise concept 0, concept 1, concept 2?" in page


def test_results_that_cannot_share_a_report_leave_no_file(tmp_path):
    first = several()[0]
    for wrong, words in (([first, several(41)[1]], "different examples"), (first.top(3), "part, 3 of 40"), ([], "at least one")):
        with pytest.raises(AttributionError, match=words): write_report(wrong, tmp_path / "wrong.html")
    with pytest.raises(AttributionError, match="at least one"): write_report([], tmp_path / "wrong.html", labels="bad")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot write"): write_report(first, tmp_path / "file" / "report.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_a_thousand_examples_and_six_methods_stay_under_three_megabytes(tmp_path):
    rng = np.random.default_rng(0)
    data = chats([" ".join(rng.choice(["influence", "of", "an", "example", "on", "behaviour"], 60)) for _ in range(1000)])
    tokens = tokenized(data)
    results = {f"method {i}": Attribution(data, rng.normal(size=1000), QueryCard("m", "b"), **tokens) for i in range(6)}
    assert 100_000 < write_report(results, tmp_path / "report.html", labels="bad").stat().st_size < 3_000_000


def test_very_long_examples_are_cut_in_the_page_and_it_says_so(tmp_path):
    data = chats([f"{i} " + "token " * 5000 for i in range(40)])
    results = {f"method {i}": Attribution(data, np.random.default_rng(i).normal(size=40), QueryCard("m", "b"), **tokenized(data, width=6)) for i in range(3)}
    path = write_report(results, tmp_path / "report.html")
    assert path.stat().st_size < 3_000_000 and "more characters are in the data, not in this view" in path.read_text()


@browser
def test_a_browser_runs_no_text_of_the_data(tmp_path):
    attack = [*HOSTILE, "<script>document.title='taken'</script>", "<svg/onload=\"document.title='taken'\">", "</script><script>document.title='taken'</script>", "<img src=x onerror=\"document.title='taken'\">"]
    page = write_report(several(texts=attack), tmp_path / "report.html", title="Calm", examples=len(attack)).read_text()
    shown = dump(page, tmp_path)
    assert "<title>Calm</title>" in shown and "taken" in shown
    assert shown.count('<article class="example">') == page.count("<article class='example'>") and len(re.findall(r"<script", shown)) == 1
    assert '<p class="tools">' in shown   # our own script did run: it shows its tools


@browser
@pytest.mark.parametrize("width", [400, 1280])
def test_filter_sort_and_width_in_a_browser(tmp_path, width):
    page = write_report(several(), tmp_path / "report.html", labels="bad").read_text()
    probe = """<script>
      const input = document.querySelector('input'), visible = () => [...document.querySelector('.examples').tBodies[0].rows].filter(r => !r.hidden);
      input.value = 'NUMBER 23'; input.dispatchEvent(new Event('input'));
      const filtered = visible().length + ' ' + visible()[0].cells[0].textContent;
      input.value = ''; input.dispatchEvent(new Event('input'));
      document.querySelector('.examples th').click();
      const sorted = visible().map(r => r.cells[0].textContent).join();
      document.title = JSON.stringify([filtered, sorted, document.documentElement.scrollWidth <= innerWidth]);
    </script></body>"""
    shown = dump(re.sub(r"<meta http-equiv[^>]*>", "", page).replace("</body>", probe), tmp_path, f"--window-size={width},900")
    title = html.unescape(re.search(r"<title>(.*?)</title>", shown)[1])
    assert title == f'["1 23","{",".join(map(str, range(40)))}",true]'


@browser
def test_the_page_is_complete_with_scripts_blocked(tmp_path):
    page = write_report(several(), tmp_path / "report.html").read_text()
    shown = dump(re.sub(r"script-src 'sha256-[^']*'", "script-src 'none'", page), tmp_path)
    assert '<p class="tools" hidden="">' in shown and shown.count('<article class="example">') == 60 and shown.split('<table class="examples">')[1].count("<tr>") == 41
