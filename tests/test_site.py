"The built site: addresses, links, what every page must say, and how it behaves in a browser."
import functools, http.server, json, os, re, shutil, subprocess, sys, threading
from pathlib import Path

import pytest
from bs4 import BeautifulSoup
from nbdev.doclinks import _nbpath2html
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output, new_raw_cell
from playwright.sync_api import sync_playwright

pytest.importorskip('smalldocs', reason='smalldocs needs Python 3.11')
from smalldocs.config import load

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'scripts'))
import crossrefs, preview

NOTEBOOKS = [p.relative_to(ROOT/'nbs') for p in sorted(ROOT.glob('nbs/**/*.ipynb'))
             if '.ipynb_checkpoints' not in p.parts]
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
PAPER = dict(light='rgb(255, 255, 255)', dark='rgb(22, 24, 29)')
PNG = 'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=='


@pytest.fixture(scope='module')
def docs():
    "The site, built once as a contributor builds it."
    run = subprocess.run([sys.executable, ROOT/'scripts'/'preview.py'], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return ROOT/'_docs'


@pytest.fixture(scope='module')
def pages(docs): return {p.relative_to(docs).as_posix(): preview.parse(p) for p in docs.rglob('*.html')}


# What every page has

def test_addresses_are_those_of_nbdev(pages):
    demos = {f'demo/{name}/index.html' for name in ('digits', 'garments')} # scripts/demo_pages.py
    assert {_nbpath2html(p).as_posix() for p in NOTEBOOKS} | demos == set(pages)


def test_no_broken_link_no_other_server_no_picture_without_text(docs): assert preview.check(docs) == []


@pytest.mark.parametrize('html, why', [
    ('<a href="nowhere.html">x</a>', 'no such page'), ('<a href="#nowhere">x</a>', 'no such anchor'),
    ('<a href="https://dlfund.github.io/dlfund/nowhere.html">x</a>', 'no such page'),
    ('<a href="https://github.com/dlfund/dlfund/blob/main/nowhere.py#L3">x</a>', 'no such file in the repository'),
    ('<script src="https://cdn.jsdelivr.net/x.js"></script>', 'asks another server'),
    ('<main><img src="site_libs/x.png" alt=""></main>', 'fig-alt')])
def test_a_planted_fault_is_found(docs, tmp_path, html, why):
    shutil.copytree(docs, tmp_path/'docs')
    with open(tmp_path/'docs'/'index.html', 'a') as f: f.write(html)
    assert why in '\n'.join(preview.check(tmp_path/'docs'))


def test_every_page_says_what_it_is(pages, docs):
    searched = {e['href'].split('#')[0] for e in json.loads((docs/'search.json').read_text())}
    for notebook in NOTEBOOKS:
        name = _nbpath2html(notebook).as_posix()
        links = [a.get('href', '') for a in pages[name].select('a')]
        assert pages[name].title.text and pages[name].select_one('h1.title').text, f'{name} has no title'
        assert name in searched, f'{name} is not in the search index'
        licences = {a.text for a in pages[name].select('.footer a[rel=license]')}
        assert licences == {'Apache-2.0', 'CC BY 4.0'}, name
        assert f'https://colab.research.google.com/github/dlfund/dlfund/blob/main/nbs/{notebook.as_posix()}' in links
        assert f'https://github.com/dlfund/dlfund/edit/main/nbs/{notebook.as_posix()}' in links
        assert pages[name].select_one('.sidebar-link.active'), f'{name} is not in the sidebar of _quarto.yml'


# What crossrefs.py does to Quarto's syntax, on a page of its own

def page(folder, *cells):
    "Render one page that holds these cells."
    front = new_raw_cell('---\ntitle: T\noutput-file: page.html\n---')
    (folder/'_quarto.yml').write_text('format: {html: {number-sections: true, number-depth: 2}}')
    (folder/'01_page.ipynb').write_text(json.dumps(new_notebook(cells=[front, *cells])))
    shutil.copy(ROOT/'nbs'/'references.bib', folder)
    preview.Book(load(folder), quiet=True).build()
    return BeautifulSoup((folder/'_site'/'page.html').read_text(), 'html.parser').main


def figure(label, cap='A line.'):
    data = new_output('display_data', data={'image/png': PNG})
    source = f'#| label: {label}\n#| fig-cap: "{cap}"\n#| fig-alt: "A line that rises."\nplot()'
    return new_code_cell(source, outputs=[data])


def test_references(tmp_path):
    main = page(tmp_path, new_markdown_cell(
        'See @fig-b, @eq-e, @sec-s, @exr-x, @tbl-t; not `@fig-b`.\n\n'
        '## One\n\n## Two {#sec-s}\n\n$$\na = b\n$$ {#eq-e}\n\n'
        '| a |\n|---|\n| 1 |\n\n: Cap {#tbl-t}'), figure('fig-a'), figure('fig-b', 'Up by $x$, see @eq-e.'),
        new_markdown_cell('::: {#exr-x}\nDo it.\n:::\n\n::: {.callout-tip collapse="true"}\n## Solution'),
        new_code_cell('1+1', outputs=[new_output('stream', text='2')]), new_markdown_cell(':::'))
    text = main.get_text().replace('\u00a0', ' ')
    assert 'See Figure 2, Equation 1, Section 2, Exercise 1, Table 1; not @fig-b.' in text
    assert 'Exercise 1 Do it.' in text and 'Table 1: Cap' in text and 'Figure 1: A line.' in text
    assert 'Figure 2: Up by x, see Equation 1.' in text and main.select_one('#fig-b figcaption math')
    assert main.select_one('#eq-e math[display=block]').get_text().endswith('(1)')
    assert main.select_one('.callout .collapse .cell-output').get_text().strip() == '2'


def test_citations(tmp_path):
    main = page(tmp_path, new_markdown_cell('By @guo2017calibration [see @smith2019super, p. 3; @ioffe2015batch].'))
    assert 'By Guo et al. (2017) (see Smith and Topin 2019, p. 3; Ioffe and Szegedy 2015).' in main.get_text()
    works = [e['id'] for e in main.select('.csl-entry')]
    assert works == ['ref-guo2017calibration', 'ref-ioffe2015batch', 'ref-smith2019super']


@pytest.mark.parametrize('text, why', [
    ('See @fig-none.', '@fig-none refers to nothing'), ('See [@nobody2020none].', '@nobody2020none is not in'),
    (r'$\nonsense{x}$', 'cannot typeset'), ('::: {#exr-a}\nx\n:::\n\n::: {#exr-a}\ny\n:::', 'exr-a is used twice')])
def test_what_cannot_be_resolved_stops_the_build(tmp_path, text, why):
    with pytest.raises(SystemExit, match=f'01_page.ipynb: .*{re.escape(why)}'): page(tmp_path, new_markdown_cell(text))


@pytest.mark.parametrize('tex', [
    r'\begin{aligned} a &= b \\ c &= d \end{aligned}', r'\operatorname*{argmax}_\theta', r'\arg\min_x',
    r'\begin{cases} x & x>0 \\ 0 & \text{else} \end{cases}', r'\left\lVert x \right\rVert_2'])
def test_mathematics(tex): assert crossrefs.mathml(tex, True).startswith('<math')


def test_code_may_hold_what_looks_like_a_reference(tmp_path):
    main = page(tmp_path, new_markdown_cell('Some prose.'), new_code_cell("text = 'see @eq-none and [@nobody2020none]'"))
    assert '@eq-none' in main.get_text()


@pytest.mark.parametrize('tex, thin', [(r'a \log p', 2), (r'\sum_i \ln p_i', 2), (r'\exp(x)', 0), (r'2\sin x', 2)])
def test_a_functions_name_keeps_its_distance(tex, thin): assert crossrefs.mathml(tex, False).count('<mspace') == thin


# A real browser

@pytest.fixture(scope='module')
def server(docs):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    with http.server.ThreadingHTTPServer(('localhost', 0), functools.partial(Quiet, directory=docs)) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f'http://localhost:{httpd.server_port}/'
        httpd.shutdown()


@pytest.fixture(scope='module')
def browser():
    if not CHROMIUM and os.environ.get('CI'): pytest.fail('no Chromium on PATH: apt-get install chromium')
    if not CHROMIUM: pytest.skip('no Chromium on PATH')
    with sync_playwright() as p:
        yield p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox', '--disable-gpu', '--disable-quic'])


def watched(browser, **kw):
    "A tab, and the list of everything that goes wrong in it."
    tab, wrong = browser.new_page(**kw), []
    tab.on('console', lambda m: wrong.append(m.text) if m.type in ('error', 'warning') else None)
    tab.on('pageerror', lambda e: wrong.append(str(e)))
    tab.on('requestfailed', lambda r: wrong.append(f'failed: {r.url}'))
    tab.on('response', lambda r: wrong.append(f'{r.status}: {r.url}') if r.status >= 400 else None)
    return tab, wrong


def paper(tab): return tab.evaluate('getComputedStyle(document.body).backgroundColor')


@pytest.mark.browser
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_every_page_opens(server, browser, pages, scheme):
    for name in pages:
        tab, wrong = watched(browser, color_scheme=scheme, viewport=dict(width=360, height=740))
        asked = []
        tab.on('request', lambda r: asked.append(r.url))
        tab.goto(server + name, wait_until='networkidle')
        assert wrong == [] and all(url.startswith((server, 'data:')) for url in asked), (name, asked)
        assert tab.evaluate('document.documentElement.scrollWidth') <= 360, f'{name} is wider than a phone'
        assert paper(tab) == PAPER[scheme], name
        tab.close()


@pytest.mark.browser
def test_search_leads_to_a_page(server, browser):
    tab, wrong = watched(browser)
    tab.goto(server + 'index.html')
    tab.fill('.smalldocs-search input >> visible=true', 'Fashion')
    tab.click('.search-result >> nth=0')
    tab.wait_for_load_state()
    assert 'fashion' in tab.inner_text('main').lower() and wrong == []


@pytest.mark.browser
def test_the_chosen_theme_stays(server, browser):
    tab, _ = watched(browser, color_scheme='light')
    tab.goto(server + 'index.html')
    assert paper(tab) == PAPER['light']
    tab.click('.quarto-color-scheme-toggle >> visible=true')
    tab.wait_for_timeout(300)
    assert paper(tab) == PAPER['dark']
    tab.reload()
    tab.wait_for_timeout(300)
    assert paper(tab) == PAPER['dark']


def sliders(pages): return [name for name in pages if pages[name].select_one('.explore')]


@pytest.mark.browser
def test_every_slider_moves_its_curves_by_the_arrow_keys(server, browser, pages):
    "What an interactive figure draws and says at each position is what Python had put into the page."
    assert len(sliders(pages)) > 3
    for name in sliders(pages):
        tab, wrong = watched(browser)
        tab.goto(server + name)
        for box in tab.locator('.explore').all():
            slider, data = box.locator('input[type=range]'), json.loads(box.locator('script').first.text_content())
            first, n = int(slider.get_attribute('value')), len(data['texts'])
            for k, key in [(first, None), (0, 'Home'), (1, 'ArrowRight'), (n - 1, 'End')]:
                if key: slider.press(key)
                drawn = [path.get_attribute('d') for path in box.locator('path[data-curve]').all()]
                assert drawn == [paths[k] for paths in data['paths']], f'{name}, position {k}'
                assert box.locator('output').inner_text() == slider.get_attribute('aria-valuetext') == data['texts'][k]
            assert box.locator('svg').get_attribute('aria-label') and box.locator('label').inner_text().strip()
        assert wrong == [], name
        tab.close()


@pytest.mark.browser
def test_a_slider_needs_no_server(docs, browser):
    tab, wrong = watched(browser)
    tab.goto((docs/'00_shared'/'plots.html').as_uri())
    slider, path = tab.locator('.explore input'), tab.locator('.explore path[data-curve]').first
    before = path.get_attribute('d')
    slider.press('End')
    assert path.get_attribute('d') != before


@pytest.mark.browser
@pytest.mark.parametrize('name, example, answer', [('digits', 4, '4, '), ('garments', 1, 'Trouser, ')])
def test_a_network_runs_inside_a_chapter(server, browser, docs, name, example, answer):
    "The frame answers, by its engine or, without one, by what was stored; it takes the page's theme and shows no bar."
    tab, wrong = watched(browser, color_scheme='light')
    tab.goto(server + '09_deployment/pages.html')
    frame = tab.locator(f'iframe[src*="demo/{name}/"]')
    frame.scroll_into_view_if_needed()
    inside = frame.content_frame
    inside.locator('#examples button').nth(example).click()
    if (docs/'demo'/'runtime').exists(): inside.locator('html[data-answered]').wait_for(timeout=60_000)
    assert inside.locator('#answer').inner_text().startswith(answer)
    tab.click('.quarto-color-scheme-toggle >> visible=true')
    inside.locator('html[data-theme=dark]').wait_for()
    heights = inside.locator('main').evaluate('e => [e.offsetHeight, window.frameElement.offsetHeight]')
    assert heights[0] <= heights[1] and wrong == []
