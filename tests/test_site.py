"""The documentation: links that cannot break unnoticed, outputs that are checked, and the finished site in a
real browser (`make test-site`)."""
import base64
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SITE, SHOTS = ROOT / '_site', ROOT / 'build/screenshots'
sys.path.insert(0, str(ROOT / 'docs'))

import build  # noqa: E402
import links  # noqa: E402
import notebooks  # noqa: E402
import reference  # noqa: E402


# ---- the builder ----------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def names():
    return links.Names(reference.load(ROOT / 'rab_nb'))


@pytest.mark.parametrize('code, full', [
    ('`certify`', 'certificate.certify'), ('`certify(probabilities, noise)`', 'certificate.certify'),
    ('`Certificate.covers`', 'certificate.Certificate.covers'),
    ('`rab_nb.noise.stream`', 'noise.stream'), ('`noise.stream`', 'noise.stream'),
    ('`rab_nb.bounds`', 'bounds')])
def test_public_names_link_to_their_reference(names, code, full):
    assert names.link(code) == f'{{py:obj}}{code[:-1]} <rab_nb.{full}>`'


@pytest.mark.parametrize('code', ['`no_such_name`', '`make test`', '`x[0]`', '`rab_nb.noise.no_such_name`'])
def test_other_code_stays_as_it_is(names, code):
    assert names.link(code) == code


def test_every_public_name_has_an_entry():
    for module in reference.load(ROOT / 'rab_nb').values():
        text = reference.page(module, str, lambda name: '')
        for name in module.public:
            assert re.search(rf'\{{py:\w+\}} {name}\b', text), f'rab_nb.{module.name}.{name}'


def test_reference_tells_arguments_errors_and_results():
    stream = reference.load(ROOT / 'rab_nb')['noise'].member('stream')
    assert [str(a) for a in stream.arguments] == ['seed: int', 'purpose: str', '*index: int']
    assert stream.arguments[0].comment.startswith('any integer') and stream.returns.comment == 'below 2^63'
    scale = reference.load(ROOT / 'rab_nb')['noise'].member('GaussianNoise')
    assert ('ValueError', '… must be > 0, got …') in scale.errors
    assert any('finite' in text for kind, text in scale.errors), 'errors of functions it calls belong to it'


@pytest.mark.parametrize('module, name', [('ensemble', 'RABClassifier'),
                                          ('estimators', 'SmoothedEnsembleClassifier'),
                                          ('defences', 'PartitionClassifier')])
def test_reference_shows_inherited_methods(module, name):
    "Bases without an entry of their own, of other modules too, lend theirs."
    found = reference.load(ROOT / 'rab_nb')[module].member(name)
    assert {'fit', 'predict', 'predict_proba', 'certify'} <= {inner.name for inner in found.members}
    assert 'random_state' in {argument.name for argument in found.arguments}


def test_modules_without_public_names_have_no_page():
    assert {'noise', 'knn'} <= set(reference.load(ROOT / 'rab_nb')) and (ROOT / 'rab_nb/bins.py').exists()
    assert 'bins' not in reference.load(ROOT / 'rab_nb')


@pytest.fixture(scope='module')
def modules():
    return reference.load(ROOT / 'rab_nb')


def entries(members, owner):
    for member in members:
        yield f'{owner}.{member.name}', member
        yield from entries(member.members, f'{owner}.{member.name}')


def test_every_argument_has_a_comment_of_its_own(modules):
    "None is missing, and none is copied from an argument beside it."
    found = []
    for name, module in modules.items():
        if not module.public: continue
        for full, member in entries(module.members, name):
            said = [a.comment for a in member.arguments if a.name != '*']
            if not all(said) or len(set(said)) < len(said): found.append((full, said))
    assert not found


def test_reference_begins_with_what_users_import(modules):
    order = {'class': 0, 'function': 1, 'data': 2}
    for module in modules.values():
        kinds = [order[member.kind] for member in module.members]
        assert kinds == sorted(kinds), f'{module.name}: classes, functions, constants'
    for name, home in reference.imported_from_the_top(ROOT / 'rab_nb'):
        members = modules[home].members
        kind = modules[home].member(name).kind
        mine = [member.name for member in members if member.kind == kind]
        main = reference.MAIN.get(home, '').split()
        main += [n for n, h in reference.imported_from_the_top(ROOT / 'rab_nb') if h == home]
        assert set(mine[:mine.index(name) + 1]) <= set(main), f'{home}: {mine} before {name}'


def test_classes_show_what_they_inherit(modules):
    "Arguments, methods, attributes and the example of a classifier whose parts stand in several cells."
    for home, name in (('ensemble', 'RABClassifier'), ('estimators', 'SmoothedEnsembleClassifier')):
        member = modules[home].member(name)
        assert [m.name for m in member.members[:4]] == ['fit', 'predict', 'predict_proba', 'certify']
        assert {'noise', 'n_estimators', 'random_state'} <= {a.name for a in member.arguments}
    text = reference.page(modules['ensemble'], str, lambda name: '')
    assert ':param lr: step size of Adam' in text and '- `classes_`: ' in text and '>>> clf.fit(X, y)' in text


def test_numbers_link_only_in_prose():
    numbers = links.Numbers()
    marked = numbers.mark('By\n\n$$x = y. \\tag{24}$$\n\n**Theorem 1.** As (24) says.', 'theory')
    assert '(eq-24)=\n$$' in marked and '[**Theorem 1.**]{#theorem-1}' in marked
    numbers.tables = {'1': '/results/quick/table1.ipynb'}
    text = 'Theorem 1 with (24), `f(24)`, $f(24)$ and f(24): Tables 1 and 2.'
    linked = links.rewrite(text, prose=lambda piece: numbers.link(piece, 'noise'))
    assert linked == ('[Theorem 1](#theorem-1) with [(24)](#eq-24), `f(24)`, $f(24)$ and f(24): '
                      'Tables [1](/results/quick/table1.ipynb) and 2.')


def test_files_become_pages_repository_links_or_errors():
    files = links.Files(ROOT, {'nbs/02_bounds.ipynb': 'bounds.ipynb'}, 'https://host/repo',
                        lambda path: '/files/' + path)
    assert files.link('[b](02_bounds.ipynb#Two-sides)',
                      'nbs/01_noise.ipynb') == '[b](/bounds.ipynb#two-sides)'
    assert files.link('[s](../settings.ini)',
                      'nbs/01_noise.ipynb') == '[s](https://host/repo/blob/main/settings.ini)'
    files.link('[x](99_absent.ipynb)', 'nbs/01_noise.ipynb')
    assert files.broken == ['nbs/01_noise.ipynb: 99_absent.ipynb']


def test_finished_site_is_checked(tmp_path):
    (tmp_path / 'a.html').write_text('<p id="here"><a href="b.html">b</a><a href="#here">ok</a><a '
                                     'href="#gone">x</a><img src="a.html"><img src="a.html" alt="fine">'
                                     '<section id="x"><h2>Hollow<a></a></h2>\n</section>'
                                     '<section><h2>Full</h2><p>text</p></section><pre>&lt;IPython.core.display&gt;</pre>')
    complaints = '\n'.join(build.check(tmp_path))
    assert 'b.html leads nowhere' in complaints
    assert '#gone has no such place' in complaints
    assert 'no alternative text' in complaints
    assert "nothing stands below 'Hollow'" in complaints and 'Full' not in complaints
    assert 'shown by its name' in complaints
    assert complaints.count('\n') == 4


def test_sidebar_is_in_reading_order():
    """Tutorials first, theory before algorithms, tables before the notebooks that draw them, internals last;
    each group as the front page lists it."""
    groups, _ = build.contents(build.sources())
    assert [*groups] == 'Tutorials Theory Algorithms Experiments Internals Reference Project'.split()
    told = (ROOT / 'nbs/index.ipynb').read_text()
    for group in 'Tutorials', 'Experiments':
        names = [page.split('/')[-1] for page in groups[group] if page.startswith(group.lower())]
        places = [told.find(f'/{name}.ipynb)') for name in names if f'/{name}.ipynb)' in told]
        assert len(places) >= 7, f'the front page names too few of {names}'
        assert group == 'Tutorials' or places == sorted(places), names
    assert groups['Experiments'][0] == 'results/index'
    for known in build.TUTORIALS, build.EXPERIMENTS, build.INTERNALS:
        pages = {Path(page).name for pages in groups.values() for page in pages}
        assert set(known) <= pages, 'an order names a page that does not exist'
    listed = {Path(page).name for group in ('Tutorials', 'Internals') for page in groups[group]}
    listed |= {Path(page).name for page in groups['Experiments'] if page.startswith('experiments/')}
    assert listed == {*build.TUTORIALS, *build.INTERNALS, *build.EXPERIMENTS}, 'pages without a place'


def next_page(site, page):
    found = re.search(r'<a class="next-page" href="([^"#]+)', (site / page).read_text())
    if not found: return ''
    return (site / page).parent.joinpath(found[1]).resolve().relative_to(site.resolve()).as_posix()


@pytest.mark.slow
def test_next_leads_through_all_pages_in_reading_order(site):
    groups, _ = build.contents(build.sources())
    wanted = ['index', *(page for pages in groups.values() for page in pages)]
    chain = ['index.html']
    while (following := next_page(site, chain[-1])) and following not in chain:
        chain.append(following)
    seen = [page.removesuffix('.html') for page in chain]
    assert [page for page in seen if page in wanted] == wanted
    rest = {path.relative_to(site).as_posix() for path in site.rglob('*.html')} - set(chain)
    assert rest <= {'genindex.html', 'py-modindex.html', 'search.html', 'report/index.html'}


def hollow_sections(parts):
    "Headings with nothing below them; `parts` are (kind of cell, source) in their order."
    pending, fenced = [], False
    for kind, text in parts:
        if kind != 'markdown' and text.strip():
            pending = []
            continue
        for line in text.split('\n'):
            fenced ^= line.startswith('```')
            found = None if fenced else re.match(r'(#{1,6})\s+\S', line)
            if found and pending and len(found[1]) <= pending[-1][0]: yield pending[-1][1]
            if found: pending = [(len(found[1]), line)]
            elif line.strip(): pending = []
    yield from (line for _, line in pending)


def written_pages():
    import nbformat
    for path in build.sources():
        yield path, [(cell.cell_type, cell.source) for cell in nbformat.read(ROOT / path, 4).cells]
    for path in [*ROOT.glob('*.md'), *(ROOT / 'results').rglob('*.md')]:
        yield str(path.relative_to(ROOT)), [('markdown', path.read_text())]


def test_no_section_is_hollow():
    seen = [('markdown', '# A\n\n## B\n\n## C\ntext'), ('code', 'x = 1'), ('markdown', '## D')]
    assert list(hollow_sections(seen)) == ['## B', '## D']
    found = {path: hollow for path, parts in written_pages() if (hollow := list(hollow_sections(parts)))}
    assert not found


def test_no_projection_where_the_number_of_models_is_the_papers():
    "A page speaks of models as if there were more of them only where some are missing."
    import json
    for path in sorted((ROOT / 'results').glob('*/table[1-9].json')):
        page, notebook = json.loads(path.read_text()), path.with_suffix('.ipynb')
        if not notebook.exists() or page.get('provisional'): continue
        cells = json.loads(notebook.read_text())['cells']
        said = json.dumps([output for cell in cells for output in cell.get('outputs', [])])
        assert 'as if N' not in said and 'were 1000' not in said, path


def test_alternative_text_is_the_sentence_before():
    prose = '## Head\n\nFirst. The radius $r$ grows with `sigma`:'
    assert links.last_sentence(prose) == 'The radius r grows with sigma.'


# ---- saved outputs --------------------------------------------------------------------------------

def drawing(level):
    import numpy as np
    from PIL import Image
    grey = np.full((160, 240), 255, np.uint8)
    grey[level:level + 2] = 0
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, 'png')
    return base64.b64encode(buffer.getvalue()).decode()


def test_a_moved_curve_is_another_figure():
    assert notebooks.same_figure(drawing(40), drawing(40))
    assert not notebooks.same_figure(drawing(40), drawing(60))


def test_changed_output_is_found():
    cell = lambda text, name='stdout': {'outputs': [{'output_type': 'stream', 'name': name, 'text': [text]}]}
    assert list(notebooks.differences(cell('0.25\n'), cell('0.25\n'))) == []
    [complaint] = notebooks.differences(cell('0.25\n'), cell('0.26\n'))
    assert '-0.25' in complaint and '+0.26' in complaint
    assert list(notebooks.differences(cell('50%', 'stderr'),
                                      cell('51%', 'stderr'))) == [], 'progress bars do not count'


def test_check_reruns_a_notebook(tmp_path):
    import nbformat
    code = nbformat.v4.new_code_cell('print(6 * 7)',
                                     outputs=[nbformat.v4.new_output('stream', name='stdout', text='41\n')])
    skipped = nbformat.v4.new_code_cell('#| slow\nprint(1)',
                                        outputs=[nbformat.v4.new_output('stream', name='stdout', text='2\n')])
    path = tmp_path / 'wrong.ipynb'
    nbformat.write(nbformat.v4.new_notebook(cells=[code, skipped]), path)
    [complaint] = notebooks.check(path)
    assert '-41' in complaint and '+42' in complaint


# ---- the site in a browser ------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
FLAGS = ('--headless=new --no-sandbox --disable-gpu --disable-background-networking '
         '--disable-component-update --disable-sync --no-first-run --disable-default-apps '
         '--hide-scrollbars').split()
WIDTHS = {1280: 900, 390: 844}
CONTRAST = '''
const rgb = c => { const v = c.match(/[\\d.]+/g).map(Number); return v.length < 4 ? [...v, 1] : v; };
const light = v => {
  const f = v.slice(0, 3).map(x => (x /= 255) <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
  return .2126 * f[0] + .7152 * f[1] + .0722 * f[2];
};
const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3]));
const behind = e => {
  const stack = [];
  for (; e; e = e.parentElement) {
    const c = rgb(getComputedStyle(e).backgroundColor);
    if (c[3]) stack.push(c);
    if (c[3] == 1) break;
  }
  return stack.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
};
const out = [], walk = document.createTreeWalker(document.querySelector('article'), NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const e = walk.currentNode.parentElement, box = e.getBoundingClientRect();
  if (!walk.currentNode.data.trim() || !box.width) continue;
  if (e.closest('mjx-assistive-mml, .headerlink, script, style, .sd-stretched-link')) continue;
  const back = behind(e), a = light(over(rgb(getComputedStyle(e).color), back)), b = light(back);
  const text = walk.currentNode.data.trim().slice(0, 40);
  out.push([(Math.max(a, b) + .05) / (Math.min(a, b) + .05), !!e.closest('pre'), text]);
}
return out;'''
OVERFLOW = '''
const width = document.documentElement.clientWidth;
const scrolls = e => ['auto', 'scroll'].includes(getComputedStyle(e).overflowX);
const fits = e => e.getBoundingClientRect().right <= width + 1;
const inside = e => {
  for (let p = e.parentElement; p; p = p.parentElement) if (scrolls(p) && fits(p)) return true;
  return false;
};
const kinds = 'article table, article pre, article img, article mjx-container';
const wide = [...document.querySelectorAll(kinds)].filter(e => !fits(e) && !scrolls(e) && !inside(e));
return [document.documentElement.scrollWidth - width, wide.map(e => e.outerHTML.slice(0, 80))];'''

# of each table: columns that start beyond its window; whether its first column stays; numbers seen beside it
TABLES = '''
const scroller = e => {
  for (let p = e.parentElement; p; p = p.parentElement)
    if (['auto', 'scroll'].includes(getComputedStyle(p).overflowX)) return p;
  return document.documentElement;
};
return [...document.querySelectorAll('article table')].map(table => {
  const window_ = scroller(table), cells = [...table.rows].flatMap(row => [...row.cells]);
  const edge = Math.min(window_.getBoundingClientRect().right, document.documentElement.clientWidth);
  const beyond = cells.filter(c => c.getBoundingClientRect().left >= edge).length;
  const number = c => /\\d[.]\\d/.test(c.textContent);
  const seen = cells.filter(c => number(c) && c.getBoundingClientRect().right <= edge + 1).length;
  const label = table.rows[table.rows.length - 1].cells[0], before = label.getBoundingClientRect().left;
  window_.scrollLeft = 60;
  const stays = window_.scrollLeft == 0 || Math.abs(label.getBoundingClientRect().left - before) < 5;
  window_.scrollLeft = 0;
  return [beyond, stays, seen, cells.filter(number).length, table.rows[0].innerText.slice(0, 60)];
});'''


@pytest.fixture(scope='module')
def site():
    if not (SITE / 'index.html').exists():
        done = subprocess.run([sys.executable, ROOT / 'docs/build.py'], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return SITE


@pytest.fixture(scope='module')
def browser():
    webdriver = pytest.importorskip('selenium.webdriver', reason='no selenium: pip install selenium')
    driver = shutil.which('chromedriver')
    if not (CHROMIUM and driver):
        pytest.skip('no browser: apt-get install chromium chromium-driver')
    from selenium.webdriver.chrome.service import Service
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
    driver = webdriver.Chrome(options=options, service=Service(driver))
    yield driver
    driver.quit()


def wait(browser, script, seconds=20):
    from selenium.webdriver.support.ui import WebDriverWait
    return WebDriverWait(browser, seconds).until(lambda driver: driver.execute_script('return ' + script))


def visit(browser, url, width=1280, dark=False):
    "Open a page as a reader with this window would; what it did before is forgotten."
    browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride',
                            {'width': width, 'height': WIDTHS[width], 'deviceScaleFactor': 1,
                             'mobile': width < 600})
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia',
                            {'features': [{'name': 'prefers-color-scheme',
                                           'value': 'dark' if dark else 'light'}]})
    browser.get_log('browser'), browser.get_log('performance')
    browser.get(url)
    wait(browser, "document.readyState == 'complete'")
    settle = ('const done = arguments[0]; if (!window.MathJax || !MathJax.startup) return done(); '
              'MathJax.startup.promise.then(done, done);')
    browser.execute_async_script(settle)


def complaints(browser):
    return [entry['message'] for entry in browser.get_log('browser')
            if entry['level'] in ('SEVERE', 'WARNING')]


def requests(browser):
    import json
    messages = [json.loads(entry['message'])['message'] for entry in browser.get_log('performance')]
    return [m['params']['request']['url'] for m in messages if m['method'] == 'Network.requestWillBeSent']


def away(urls):
    return [url for url in urls if not url.startswith(('file:', 'data:', 'blob:'))]


def unloaded(browser):
    return browser.execute_script('return [...document.images].filter(i => !(i.complete && '
                                  'i.naturalWidth)).map(i => i.src)')


def shoot(browser, name):
    SHOTS.mkdir(parents=True, exist_ok=True)
    width, height = browser.execute_script('return [innerWidth, document.documentElement.scrollHeight]')
    options = {'captureBeyondViewport': True,
               'clip': {'x': 0, 'y': 0, 'width': width, 'height': min(height, 3 * width + 1000), 'scale': 1}}
    (SHOTS / f'{name}.png').write_bytes(
        base64.b64decode(browser.execute_cdp_cmd('Page.captureScreenshot', options)['data']))


def page(site, kind):
    tables = sorted(site.glob('results/*/table[1-9].html'),
                    key=lambda path: (build.PROFILES.index(path.parent.name), path.name))
    if kind == 'table' and not tables:
        pytest.skip('no table has been run yet: make tables')
    return tables[0] if kind == 'table' else site / f'{kind}.html'


@pytest.mark.slow
@pytest.mark.parametrize('width', WIDTHS)
@pytest.mark.parametrize('kind', ['index', 'theory', 'table', 'reference/certificate'])
def test_page(browser, site, kind, width):
    visit(browser, page(site, kind).as_uri(), width)
    shoot(browser, f'{kind.replace("/", "-")}-{width}')
    assert complaints(browser) == []
    asked = requests(browser)
    assert asked and away(asked) == []
    assert unloaded(browser) == []
    count = "document.querySelectorAll('{}').length"
    pair = f"[{count.format('article .math')}, {count.format('article .math mjx-container')}]"
    formulas, typeset = browser.execute_script(f'return {pair}')
    assert typeset >= formulas and (formulas > 0 or kind not in ('index', 'theory'))
    assert browser.execute_script("return document.querySelectorAll('mjx-merror, .problematic, "
                                  ".system-message').length") == 0
    assert browser.execute_script(OVERFLOW) == [0, []]


def pages_with_tables(site):
    "Landing page, results and experiments: where numbers are compared"
    where = 'results/**/*.html', 'experiments/*.html'
    return [site / 'index.html', *(path for pattern in where for path in sorted(site.glob(pattern)))]


@pytest.mark.slow
def test_tables_fit_on_a_screen(browser, site):
    for path in pages_with_tables(site):
        visit(browser, path.as_uri())
        wide = [found for found in browser.execute_script(TABLES) if found[0]]
        assert not wide, f'{path.relative_to(site)}: columns start beyond the window of {wide}'


@pytest.mark.slow
def test_tables_show_labels_and_numbers_on_a_phone(browser, site):
    for path in pages_with_tables(site):
        if path.parent.name == 'experiments' and path.stem not in ('dnn', 'knn'): continue # text comes first
        visit(browser, path.as_uri(), 390)
        bad = [found for found in browser.execute_script(TABLES)
               if not found[1] or (found[3] and not found[2])]
        assert not bad, f'{path.relative_to(site)}: no label that stays, or no number seen, in {bad}'


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['theory', 'theorems', 'ensemble', 'knn', 'certificate', 'tutorials/errata'])
def test_formulas_and_code_fit_on_a_phone(browser, site, kind):
    visit(browser, (site / f'{kind}.html').as_uri(), 390)
    assert browser.execute_script(OVERFLOW) == [0, []]
    covered = browser.execute_script('''
        return [...document.querySelectorAll('div.cell.tag_export div.cell_input')].filter(e =>
          getComputedStyle(e, '::after').position == 'absolute').length''')
    assert covered == 0, 'the tag of a cell lies over its code'


@pytest.mark.slow
@pytest.mark.parametrize('dark', [False, True], ids=['light', 'dark'])
@pytest.mark.parametrize('kind', ['index', 'theory', 'table', 'reference/certificate'])
def test_contrast(browser, site, kind, dark):
    visit(browser, page(site, kind).as_uri(), dark=dark)
    shoot(browser, f'{kind.replace("/", "-")}-{"dark" if dark else "light"}')
    found = browser.execute_script(CONTRAST)
    assert len(found) > 50
    pale = [(round(ratio, 1), text) for ratio, in_code, text in found if ratio < (3 if in_code else 4.5)]
    assert not pale


@pytest.mark.slow
def test_theme_button(browser, site):
    visit(browser, (site / 'theory.html').as_uri())
    colours = set()
    for _ in range(3):
        browser.execute_script("[...document.querySelectorAll('.theme-toggle')].find(e => "
                               "e.offsetParent).click()")
        colours.add(browser.execute_script("return document.body.dataset.theme + "
                                           "getComputedStyle(document.body).backgroundColor"))
    assert len(colours) == 3
    browser.execute_script('localStorage.clear()')


@pytest.mark.slow
def test_search_from_files(browser, site):
    from selenium.webdriver.common.keys import Keys
    visit(browser, (site / 'index.html').as_uri())
    browser.find_element('css selector', '.sidebar-search').send_keys('Hoeffding', Keys.ENTER)
    wait(browser, "document.querySelectorAll('ul.search li a').length > 2")
    wait(browser, "/[Ff]ound|[Ff]inished/.test(document.querySelector('#search-results').innerText)")
    hits = browser.execute_script("return [...document.querySelectorAll('ul.search li a')].map(a => "
                                  "a.href.split('/').pop().split(/[?#]/)[0])")
    shoot(browser, 'search-hoeffding')
    assert 'bounds.html' in hits[:5]
    assert complaints(browser) == [] and away(requests(browser)) == []


@pytest.mark.slow
def test_two_clicks_to_my_own_model(browser, site):
    if not (site / 'tutorials/own_model.html').exists():
        pytest.skip('the tutorial is not written yet')
    visit(browser, (site / 'index.html').as_uri())
    browser.execute_script("[...document.querySelectorAll('.sd-card')].find(e => "
                           "e.innerText.includes('Certify my own model')).querySelector('a').click()")
    wait(browser,
         "location.pathname.endsWith('tutorials/own_model.html') && document.readyState == 'complete'")


@pytest.mark.slow
def test_the_tests_see_a_bad_page(browser, tmp_path):
    bad = tmp_path / 'bad.html'
    bad.write_text('<meta name=viewport content="width=device-width"><body '
                   'style="background:#111"><article><p style="color:#333">pale</p><img '
                   'src="http://127.0.0.1:9/x.png"><table '
                   'style="width:900px"><tr><td>wide</td></tr></table></article><script>gone()</script>')
    visit(browser, bad.as_uri(), 390)
    assert any('gone' in text for text in complaints(browser))
    assert away(requests(browser)) == ['http://127.0.0.1:9/x.png'] == unloaded(browser)
    beyond, wide = browser.execute_script(OVERFLOW)
    assert beyond > 0 and any('<table' in text for text in wide)
    assert browser.execute_script(CONTRAST)[0][0] < 2
