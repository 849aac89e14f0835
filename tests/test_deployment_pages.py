"The two pages: what is made without a browser, and what people can do with them in a real one."
import functools, http.server, json, os, shutil, socket, sys, threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import sync_playwright

from dlfund.data.datasets import load
from dlfund.data.preprocessing import read_batch
from dlfund.deployment import pages
from dlfund.deployment.bundle import Bundle
from dlfund.deployment.pages import (DRAWINGS, Drawing, PageError, check_runtime, draw_strokes, drawing_of,
                                     fetch_runtime, fit_bytes, launch_ui, static_page, stored_strokes)

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
HOME = Path(pages.__file__).parent/'pretrained'
pytestmark = pytest.mark.browser


@pytest.fixture(scope='session')
def digits(): return Bundle.load(HOME/'digits-drawing')


@pytest.fixture(scope='session')
def garments(): return Bundle.load(HOME/'garments-drawing')


@pytest.fixture(scope='session')
def engine():
    "The files of onnxruntime-web, from the cache or from npm."
    try: return fetch_runtime()
    except PageError as e:
        if os.environ.get('CI'): pytest.fail(str(e))
        pytest.skip(str(e))


@pytest.fixture(scope='session')
def site(digits, garments, engine, tmp_path_factory):
    "Both static pages and one without an engine, served by a plain server of files."
    folder = tmp_path_factory.mktemp('site')
    static_page(digits, folder/'digits', engine, title='Draw a digit')
    static_page(garments, folder/'garments', runtime_url='../digits/runtime/', title='Draw a garment')
    static_page(garments, folder/'bare', runtime=False)
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=folder)) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{httpd.server_port}/'
        httpd.shutdown()


@pytest.fixture(scope='session')
def browser():
    if not CHROMIUM and os.environ.get('CI'): pytest.fail('no Chromium on PATH: apt-get install chromium')
    if not CHROMIUM: pytest.skip('no Chromium on PATH')
    with sync_playwright() as p:
        yield p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox', '--disable-gpu', '--disable-quic'])


@pytest.fixture
def tab(browser):
    "Open a page; whatever goes wrong in it, or leaves this machine, fails the test at its end."
    opened = []
    def visit(url, allow=(), **kw):
        page, wrong = browser.new_page(**kw), []
        page.on('console', lambda m: wrong.append(m.text) if m.type == 'error' else None)
        page.on('pageerror', lambda e: wrong.append(str(e)))
        page.on('requestfailed', lambda r: wrong.append(f'failed: {r.url}'))
        page.on('response', lambda r: wrong.append(f'{r.status}: {r.url}') if r.status >= 400 else None)
        here = url.split('/')[2]
        page.on('request', lambda r: wrong.append(f'asks another server: {r.url}')
                if r.url.split(':')[0] in ('http', 'https', 'ws', 'wss') and r.url.split('/')[2] != here else None)
        page.goto(url)
        opened.append((page, wrong))
        return page
    yield visit
    for page, wrong in opened:
        page.close()
        assert wrong == []


def hand(page, canvas, strokes):
    "Draw strokes with the mouse, each point moved to in four small steps."
    page.locator(canvas).scroll_into_view_if_needed()
    box = page.locator(canvas).bounding_box()
    for stroke in strokes:
        for i, (x, y) in enumerate(stroke):
            page.mouse.move(box['x'] + x/1000*box['width'], box['y'] + y/1000*box['height'], steps=4 if i else 1)
            if not i: page.mouse.down()
        page.mouse.up()


def answered(page, before=''):
    "Wait for an answer by the engine; its probabilities, and the bytes that the page says the network got."
    page.wait_for_selector(f'html[data-answered]:not([data-answered="{before}"])', timeout=60_000)
    rgba = page.evaluate("""() => { const c = document.getElementById('seen');
      return Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data) }""")
    size = page.evaluate("[document.getElementById('seen').height, document.getElementById('seen').width]")
    picture = np.array(rgba, np.uint8).reshape(*size, 4)[..., 0]
    return page.evaluate('window.probabilities'), picture, page.evaluate('document.documentElement.dataset.answered')


def same(bundle, probabilities, picture):
    "Python's answer to the same bytes, after it was compared with the page's."
    prediction = bundle.predict(picture[None])[0]
    np.testing.assert_allclose(probabilities, [prediction.probabilities[label] for label in bundle.labels], atol=1e-5)
    return prediction.label


def save(picture, path):
    "Save a picture without loss."
    Image.fromarray(picture).save(path)
    return path


# The scripts prepare pictures as Python does

def test_pictures_are_fitted_to_the_same_bytes(site, tab):
    "`fitBytes` in a browser and `fit_bytes` in Python, which the chapter proves equal to Pillow."
    page, rng = tab(site + 'digits/index.html'), np.random.default_rng(0)
    for i in range(60):
        h, w, new_h, new_w = (int(v) for v in rng.integers(1, 90, 4))
        channels = 1 + 2*(i % 2)
        x = rng.integers(0, 256, (h, w, channels), dtype=np.uint8)
        found = page.evaluate("""async ([data, ...rest]) => Array.from(
            (await import('./picture.js')).fitBytes(Uint8Array.from(data), ...rest))""",
            [x.ravel().tolist(), h, w, channels, [new_h, new_w]])
        expected = fit_bytes(x[..., 0] if channels == 1 else x, (new_h, new_w))
        np.testing.assert_array_equal(np.array(found, np.uint8), expected.ravel(), err_msg=str((h, w, new_h, new_w)))


def test_strokes_become_the_same_bytes(site, tab):
    page, rng = tab(site + 'digits/index.html'), np.random.default_rng(1)
    ways = [drawing_of(Bundle.load(HOME/name)) for name in ('digits-drawing', 'garments-drawing')]
    ways += [Drawing(size=(5, 7), cells=3, box=(11, 20), pens=(1.5, 2.5), ink=60, inside=99)]
    drawn = [[rng.integers(0, 1001, (int(rng.integers(1, 9)), 2)).tolist() for _ in range(int(rng.integers(1, 4)))]
             for _ in range(20)] + [stored_strokes(label) for label in DRAWINGS] + [[[[3, 4]]]]
    for way in ways:
        for strokes in drawn:
            found = page.evaluate("""async ([strokes, drawing]) => Array.from(
                (await import('./picture.js')).drawStrokes(strokes, drawing))""", [strokes, pages.asdict(way)])
            expected = draw_strokes(strokes, way).ravel()
            np.testing.assert_array_equal(np.array(found, np.uint8), expected, err_msg=str(strokes))


# The static page

def test_ten_digits_drawn_with_the_mouse(site, tab, digits):
    page, turn = tab(site + 'digits/index.html'), ''
    for label in digits.labels:
        page.click('[data-pad=clear]')
        said = None
        for stroke in stored_strokes(label): # an answer after each stroke
            hand(page, '.pad canvas', [stroke])
            probabilities, picture, turn = answered(page, turn)
            said = same(digits, probabilities, picture)
        assert said == label
        assert page.inner_text('#answer').startswith(f'{label}, ')
        ideal = draw_strokes(stored_strokes(label), drawing_of(digits))
        assert abs(picture.astype(float) - ideal).mean() < 12 # a mouse is on whole pixels, the stored points are not


def test_garments_drawn_with_the_mouse(site, tab, garments):
    page, turn = tab(site + 'garments/index.html'), ''
    for label in ('Trouser', 'Dress', 'Bag', 'Ankle boot'):
        page.click('[data-pad=clear]')
        hand(page, '.pad canvas', stored_strokes(label)[:1])
        probabilities, picture, turn = answered(page, turn)
        assert same(garments, probabilities, picture) == label and page.inner_text('#bars .name >> nth=0') == label


def test_a_finger_draws(site, browser, digits):
    context = browser.new_context(has_touch=True, is_mobile=True, viewport=dict(width=360, height=740))
    page = context.new_page()
    page.goto(site + 'digits/index.html')
    box = page.locator('.pad canvas').bounding_box()
    touch = context.new_cdp_session(page)
    point = lambda x, y: [dict(x=box['x'] + x/1000*box['width'], y=box['y'] + y/1000*box['height'])]
    for stroke in stored_strokes('1'):
        touch.send('Input.dispatchTouchEvent', dict(type='touchStart', touchPoints=point(*stroke[0])))
        for p in stroke[1:]: touch.send('Input.dispatchTouchEvent', dict(type='touchMove', touchPoints=point(*p)))
        touch.send('Input.dispatchTouchEvent', dict(type='touchEnd', touchPoints=[]))
    probabilities, picture, _ = answered(page)
    assert same(digits, probabilities, picture) == '1'
    assert page.evaluate('scrollY') == 0 # the page did not scroll under the finger
    context.close()


def test_keyboard_only(site, tab, digits):
    "Tab to the pad, draw a one by arrow keys, undo it; Tab to an example and choose it."
    page = tab(site + 'digits/index.html')
    where = "document.activeElement.tagName + ' ' + (document.activeElement.dataset.pad || '')"
    at = lambda: page.evaluate(where).strip()
    page.keyboard.press('Tab')
    assert at() == 'CANVAS'
    for key, n in (('ArrowUp', 8), (' ', 1), ('ArrowDown', 16), (' ', 1)):
        for _ in range(n): page.keyboard.press(key)
    assert page.inner_text('.pad-said') == 'Pen lifted'
    probabilities, picture, turn = answered(page)
    assert same(digits, probabilities, picture) == '1'
    for name in ('BUTTON undo', 'BUTTON clear', 'INPUT', 'BUTTON'):
        page.keyboard.press('Tab')
        assert at() == name
    for _ in range(4): page.keyboard.press('Tab')
    page.keyboard.press('Enter')
    probabilities, picture, _ = answered(page, turn)
    assert same(digits, probabilities, picture) == '4'
    assert page.get_attribute('#examples button >> nth=4', 'aria-pressed') == 'true'


def test_a_chosen_file_is_read_as_python_reads_it(site, tab, garments, tmp_path):
    page, rng, turn = tab(site + 'garments/index.html'), np.random.default_rng(0), ''
    shoe = load('fashion-mini').valid.x[11]
    large = np.asarray(Image.fromarray(shoe).resize((400, 400))) # and a wide one in colour, and one with a palette
    files = [save(shoe, tmp_path/'a.png'), save(large, tmp_path/'b.png'),
             save(rng.integers(0, 256, (90, 171, 3), dtype=np.uint8), tmp_path/'c.png'), tmp_path/'d.gif',
             save(rng.integers(0, 256, (50, 31), dtype=np.uint8), tmp_path/'e.bmp')]
    Image.fromarray(large).convert('P').save(files[3])
    for file in files:
        page.set_input_files('input[type=file]', file)
        probabilities, picture, turn = answered(page, turn)
        np.testing.assert_array_equal(picture, read_batch([file], garments.preprocess)[0].numpy(), err_msg=file.name)
        same(garments, probabilities, picture)
    Image.fromarray(large).save(tmp_path/'f.jpg', quality=90)
    page.set_input_files('input[type=file]', tmp_path/'f.jpg')
    _, picture, _ = answered(page, turn)
    theirs = read_batch([tmp_path/'f.jpg'], garments.preprocess)[0].numpy()
    assert abs(picture.astype(int) - theirs).max() <= 2 # another decoder


@pytest.mark.parametrize('content', [b'<svg onload="alert(1)"/>', b'\x89PNG\r\n\x1a\n' + bytes(40), b'', b'MZ\0\0'])
def test_a_hostile_file_gives_a_sentence(site, tab, tmp_path, content):
    page = tab(site + 'digits/index.html')
    (tmp_path/'x.png').write_bytes(content)
    page.set_input_files('input[type=file]', tmp_path/'x.png')
    page.wait_for_selector('#answer .wrong')
    assert 'not a picture' in page.inner_text('#answer')
    page.click('#examples button >> nth=3') # and the page goes on
    assert answered(page)[0]


def test_without_an_engine_the_page_says_so(site, tab, garments):
    page = tab(site + 'bare/index.html')
    page.click('#examples button >> nth=8')
    assert page.inner_text('#answer').startswith('Bag, ') and 'stored' in page.inner_text('#status')
    hand(page, '.pad canvas', stored_strokes('Bag'))
    page.wait_for_selector('#answer .wrong')
    assert 'no engine' in page.inner_text('#answer')


def test_the_engine_is_fetched_only_when_it_is_needed(site, tab):
    page, asked = tab(site + 'digits/index.html'), []
    page.on('request', lambda r: asked.append(r.url.rsplit('/')[-1]))
    page.wait_for_timeout(500)
    assert asked == []
    page.click('#examples button >> nth=2')
    answered(page)
    assert sorted(asked) == sorted(['model.onnx', *pages.RUNTIME_FILES])


# Both pages: what everyone needs

CHECKS = r"""() => {
  const found = [], seen = e => e.getClientRects().length && getComputedStyle(e).visibility !== 'hidden';
  const labels = e => e.labels ? [...e.labels].map(l => l.textContent).join(' ') : '';
  const name = e => (e.getAttribute('aria-label') || e.textContent || e.title || labels(e)).trim();
  if (!document.documentElement.lang) found.push('no language');
  if (!document.title) found.push('no title');
  if (document.querySelectorAll('h1').length !== 1) found.push('not one h1');
  const ids = [...document.querySelectorAll('main [id]')].map(e => e.id);
  if (new Set(ids).size !== ids.length) found.push('an id is used twice');
  for (const e of document.querySelectorAll('main :is(button, input, canvas[tabindex], a[href])')) {
    if (!seen(e)) continue;
    if (!name(e)) found.push('no name: ' + e.outerHTML.slice(0, 90));
  }
  for (const e of document.querySelectorAll('main img'))
    if (!e.hasAttribute('alt')) found.push('no alt: ' + e.outerHTML.slice(0, 90));
  for (const by of ['aria-labelledby', 'aria-describedby']) for (const e of document.querySelectorAll(`main [${by}]`))
    for (const id of e.getAttribute(by).split(/\s+/)) if (!document.getElementById(id)) found.push('nothing is ' + id);
  const rgb = c => { const n = c.match(/[\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => [r, g, b].map(v => linear(v / 255))
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  for (const e of document.querySelectorAll(WHERE)) {
    if (!seen(e) || ![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
    let behind = e;
    while (behind && rgb(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
    const paper = behind ? rgb(getComputedStyle(behind).backgroundColor) : [255, 255, 255];
    const [a, b] = [light(rgb(getComputedStyle(e).color)), light(paper)];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) found.push(`contrast ${ratio.toFixed(2)}: ` + e.outerHTML.slice(0, 90));
  }
  return found;
}"""


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('name', ['digits', 'garments', 'bare'])
def test_the_static_page_is_accessible(site, tab, name, scheme):
    page = tab(site + f'{name}/index.html', color_scheme=scheme, viewport=dict(width=360, height=740))
    assert page.evaluate(CHECKS.replace('WHERE', "'main *'")) == []
    assert page.evaluate('document.documentElement.scrollWidth') <= 360
    small = page.evaluate("""[...document.querySelectorAll('main :is(button, .file)')].filter(
        e => e.getBoundingClientRect().height < 44).map(e => e.outerHTML)""")
    assert small == []
    assert page.get_attribute('#answer', 'aria-live') == 'polite'


# The Gradio page

@pytest.fixture(scope='session')
def gradio(garments):
    "The page of garments, on a free port of this machine."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    page = launch_ui(HOME/'garments-drawing', port=port, block=False)
    yield f'http://127.0.0.1:{port}/'
    page.close()


def ready(page):
    page.wait_for_selector('#picture input[type=file]', state='attached', timeout=60_000)
    page.wait_for_selector('#answer[aria-live=polite]')


def says(page, text):
    "Wait until the answer begins with a text; the list of bars."
    page.locator('#answer .said', has_text=text).wait_for(timeout=60_000)
    return [row.split('\n') for row in page.locator('#answer li').all_inner_texts()]


def as_shown(bundle, picture):
    "The rows that Python would show."
    p = bundle.predict(picture[None])[0]
    ranked = sorted(p.probabilities.items(), key=lambda pair: -pair[1])[:5]
    return p.label, [[label, pages.percent(v)] for label, v in ranked]


def test_gradio_answers_an_upload_as_python_does(gradio, tab, garments, tmp_path):
    page, valid = tab(gradio), load('fashion-mini').valid
    ready(page)
    picture = valid.x[valid.y == 7][0]
    label, rows = as_shown(garments, picture)
    page.set_input_files('#picture input[type=file]', save(picture, tmp_path/'shoe.png'))
    assert says(page, label) == rows and label == 'Sneaker'
    assert label in page.get_attribute('#look img', 'alt')


def test_gradio_answers_a_drawing_and_an_example(gradio, tab, garments):
    page = tab(gradio)
    ready(page)
    page.get_by_role('tab', name='Drawing').click()
    hand(page, '#pad canvas', stored_strokes('Trouser'))
    assert says(page, 'Trouser')[0][0] == 'Trouser'
    page.locator('#examples button', has_text='Bag, drawn').click()
    label, rows = as_shown(garments, draw_strokes(stored_strokes('Bag'), drawing_of(garments)))
    assert says(page, label) == rows


def test_gradio_by_keyboard(gradio, tab):
    page = tab(gradio)
    ready(page)
    page.get_by_role('tab', name='Picture').focus()
    page.keyboard.press('ArrowRight')
    page.keyboard.press('Enter')
    page.locator('#pad canvas').focus()
    for key, n in (('ArrowUp', 6), (' ', 1), ('ArrowDown', 10), ('ArrowRight', 3), ('ArrowUp', 10), (' ', 1)):
        for _ in range(n): page.keyboard.press(key)
    page.wait_for_selector('#answer .said', timeout=60_000)
    for _ in range(60): # on to an example, by Tab alone
        page.keyboard.press('Tab')
        if page.evaluate("document.activeElement.matches('#examples button')"): break
    for _ in range(3): page.keyboard.press('Tab')
    page.keyboard.press('Enter')
    says(page, 'Dress')


@pytest.mark.parametrize('content, sentence', [
    (b'<svg onload="alert(1)"/>', 'must be a picture'), (b'MZ' + bytes(500), 'must be a picture'),
    ('half', 'must be whole'), ('bomb', 'pixels')])
def test_gradio_refuses_a_hostile_file_with_a_sentence(gradio, tab, tmp_path, content, sentence):
    if isinstance(content, str):
        Image.fromarray(np.zeros((9000, 9000) if content == 'bomb' else (99, 99), np.uint8)).save(tmp_path/'x.png')
        content = (tmp_path/'x.png').read_bytes()[:None if content == 'bomb' else 60]
    (tmp_path/'x.png').write_bytes(content)
    page = tab(gradio)
    ready(page)
    page.set_input_files('#picture input[type=file]', tmp_path/'x.png')
    page.wait_for_selector('#answer [role=alert]', timeout=60_000)
    said = page.inner_text('#answer')
    assert sentence in said and 'Traceback' not in said and str(tmp_path) not in said and 'gradio' not in said


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_gradio_on_a_phone(gradio, tab, scheme):
    page = tab(gradio, color_scheme=scheme, viewport=dict(width=360, height=740))
    ready(page)
    page.locator('#examples button >> nth=1').click()
    says(page, 'Trouser')
    assert page.evaluate('document.documentElement.scrollWidth') <= 360
    where = "'#head *, #answer *, #look *, #examples *, #pad *'"
    assert page.evaluate(CHECKS.replace('WHERE', where)) == []


# What needs no browser

def test_a_port_in_use_is_one_sentence():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        s.listen()
        with pytest.raises(PageError, match=f'port={s.getsockname()[1]} in use'):
            launch_ui(HOME/'digits-drawing', port=s.getsockname()[1], block=False)


def test_without_gradio_the_extra_is_named(monkeypatch, digits):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    with pytest.raises(PageError, match=r"pip install 'dlfund\[deploy\]'"): pages.make_ui(digits)


def npm(folder, script, monkeypatch):
    "Put a program named npm on the path, and nothing else."
    folder.mkdir()
    if script:
        (folder/'npm').write_text(f'#!{sys.executable}\n{script}')
        (folder/'npm').chmod(0o755)
    monkeypatch.setenv('PATH', str(folder))
    monkeypatch.delenv('DLFUND_OFFLINE')


@pytest.mark.parametrize('script, why', [
    ('', 'npm must be installed'), ('import sys; sys.exit("E404 not found")', 'E404 not found'),
    ('import sys, tarfile, io, os\nwith tarfile.open(sys.argv[-1] + "/x.tgz", "w:gz") as t:\n'
     f'    for n in {list(pages.RUNTIME_FILES)}:\n'
     '        i = tarfile.TarInfo("package/dist/" + n); i.size = 4; t.addfile(i, io.BytesIO(b"evil"))',
     'got other files')])
def test_an_engine_that_cannot_be_had_is_explained(tmp_path, monkeypatch, script, why):
    npm(tmp_path/'bin', script, monkeypatch)
    with pytest.raises(PageError, match=why): fetch_runtime(tmp_path/'engine')
    assert not list((tmp_path).glob('engine/*.wasm')) # nothing unchecked is kept


def test_offline_the_page_is_made_without_an_engine(tmp_path, digits):
    with pytest.warns(UserWarning, match='DLFUND_OFFLINE'): page = static_page(digits, tmp_path/'page')
    assert json.loads(page.read_text().partition('id="facts">')[2].partition('</script>')[0])['runtime'] is None


def test_an_altered_engine_is_fetched_again(tmp_path, engine, monkeypatch):
    shutil.copytree(engine, tmp_path/'engine')
    with open(tmp_path/'engine'/'ort.wasm.min.mjs', 'a') as f: f.write('//')
    assert check_runtime(tmp_path/'engine') == ['ort.wasm.min.mjs']
    with pytest.raises(PageError, match='DLFUND_OFFLINE'): fetch_runtime(tmp_path/'engine')
