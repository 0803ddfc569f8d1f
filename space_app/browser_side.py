"""What the page needs in the browser: its style, and the few lines of JavaScript that Gradio has nothing for."""

from .checks import MAX_ASKED
from .uploads import MAX_FILE_BYTES, MAX_FILES
from .waiting import MAX_WAITING_OF_ONE

CSS = """
.f2b-tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); gap: 10px; list-style: none;
  padding: 0; margin: 8px 0; }
.f2b-small { grid-template-columns: repeat(auto-fill, 72px); }
.f2b-tiles li, .f2b-tiles label { display: flex; flex-direction: column; gap: 2px; font-size: 13px; margin: 0;
  color: var(--body-text-color); overflow-wrap: anywhere; }
.f2b-tiles img { width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--background-fill-secondary);
  border: 1px solid var(--border-color-primary); border-radius: 6px; margin: 0; }
.f2b-tiles label { cursor: pointer; position: relative; }
.f2b-tiles label input { position: absolute; left: 6px; top: 6px; width: 20px; height: 20px; }
.f2b-tiles label:has(input:checked) img { outline: 3px solid var(--color-accent); }
.f2b-tiles label:has(input:focus-visible) { outline: 3px solid var(--body-text-color); outline-offset: 2px; }
.f2b-choose { border: 0; padding: 0; margin: 0; max-height: 420px; overflow-y: auto; }
.f2b-choose legend, .f2b-table caption { font-weight: 600; text-align: left; color: var(--body-text-color); }
.f2b-bar { display: block; height: 8px; background: var(--background-fill-secondary);
  border: 1px solid var(--border-color-primary); border-radius: 4px; }
.f2b-bar i { display: block; height: 100%; background: var(--color-accent); border-radius: 4px; }
.f2b-message { padding: 10px 12px; border-radius: 6px; border: 1px solid var(--border-color-primary);
  border-left: 6px solid #2e7d32; background: var(--background-fill-secondary); color: var(--body-text-color);
  overflow-wrap: anywhere; }
.f2b-alert { border-left-color: #c62828; }
.f2b-heard { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.block:has(> .wrap.hide):has(> .html-container > .prose:empty, > .html-container > .prose > p:only-child:empty,
  > .html-container > .prose > .f2b-heard) { height: 0; margin-top: calc(-1 * var(--layout-gap)) !important; }
.block > .html-container:has(> .prose:empty, > .prose > p:only-child:empty, > .prose > .f2b-heard) { padding: 0; }
.dark { --color-accent: var(--primary-400); }
.f2b-missing { display: grid; place-content: center; aspect-ratio: 1; text-align: center; font-size: 12px;
  border: 1px dashed var(--border-color-primary); }
.f2b-pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(240px, 100%), 1fr)); gap: 10px; }
.f2b-pair > div { border: 1px solid var(--border-color-primary); border-radius: 6px; padding: 8px 12px;
  background: var(--background-fill-secondary); }
.f2b-pair h4 { margin: 0; font-size: 13px; } .f2b-answer { margin: 4px 0 0; overflow-wrap: anywhere; }
.f2b-question { font-weight: 600; margin: 12px 0 6px; overflow-wrap: anywhere; }
.f2b-table { width: 100%; table-layout: fixed; border: 0 !important; border-collapse: collapse; margin: 12px 0;
  color: var(--body-text-color); }
.f2b-table th, .f2b-table td { text-align: left; padding: 6px 8px; font-weight: 400; vertical-align: top;
  border-bottom: 1px solid var(--border-color-primary); overflow-wrap: anywhere; }
.f2b-table thead th { font-weight: 600; overflow-wrap: normal; padding: 6px 2px 6px 8px; }
@media (max-width: 640px) { #f2b-settings .form { flex-direction: column; } .f2b-table { font-size: 14px; } }
.f2b-table thead, .f2b-table tbody, .f2b-table tr, .f2b-table th, .f2b-table td { border-left: 0; border-right: 0;
  border-top: 0; }
.f2b-note { font-size: 13px; color: var(--body-text-color); margin: 8px 0; }
.f2b-saving { font-size: 17px; margin: 12px 0 0; color: var(--body-text-color); }
.f2b-tries { display: flex; flex-wrap: wrap; gap: 8px; align-items: center; font-size: 14px; margin: 0; }
.f2b-tries .f2b-try { border: 1px solid var(--border-color-primary); border-radius: 16px; padding: 4px 12px; margin: 0;
  background: var(--background-fill-secondary); color: var(--body-text-color); text-align: left; cursor: pointer;
  font-size: 14px; font-weight: 400; line-height: 1.4; }
.f2b-tries .f2b-try:hover { border-color: var(--color-accent); }
.gradio-container :is(input, textarea, button, a):focus-visible { outline: 2px solid var(--color-accent) !important;
  outline-offset: 2px !important; }
footer .divider { display: none !important; }
.f2b-figure { margin: 0; } .f2b-figure img { max-width: 100%; min-width: 192px; max-height: 320px; }
"""
# Read out by a screen reader whenever its content changes.
LIVE = """element.setAttribute('role', 'status'); element.setAttribute('aria-live', 'polite');
watch('value', () => element.querySelector('.f2b-alert')?.scrollIntoView({ block: 'nearest' }))"""
ANSWERED = "watch('value', () => window.f2b.answered())"
# Of pictures to choose from that come and go: those that stay stay ticked.
KEEP_TICKS = "watch('value', () => window.f2b.tick())"
# What the page remembers: the number of the conversation; how often the pictures were removed; the batches of files
# that have arrived and are not yet handed on, how many are being added, and those kept back here while the server has
# as many as may wait; and files that are refused here, before they are sent, so that good ones of the same choice are
# taken and large ones cost nobody any time.
_PAGE = """(MOST_BYTES, MOST_FILES, MOST_ASKED, MOST_WAITING) => {
  const none = () => ({ count: 0, large: [], query: false });
  const f2b = (window.f2b = { conversation: 0, removals: 0, arrived: [], adding: 0, held: [], sent: 0, before: 0,
    refused: none(), ticked: new Set(), asked: new Set() });
  f2b.refusals = () => { const found = f2b.refused; f2b.refused = none(); return found; };
  f2b.arrive = (files) => {
    f2b.arrived.push({ files, removals: f2b.before });
    f2b.adding += 1;
    setTimeout(() => { f2b.sent = 0; }, 100);
    return null;
  };
  f2b.added = () => { f2b.adding -= 1; return []; };
  f2b.next = () => {
    f2b.batch = f2b.arrived.shift() ?? { files: null, removals: f2b.removals };
    return f2b.batch.files;
  };
  f2b.remove = () => { f2b.held = []; tell(); return ++f2b.removals; };
  const tell = () => {
    const number = f2b.held.length;
    const words = `${number} more ${number > 1 ? 'batches' : 'batch'} of pictures will be sent when others are done.`;
    const place = document.querySelector('#f2b-held p');
    if (place) place.textContent = number ? words : '';
  };
  const isQuery = (input) => !input.closest('#f2b-upload');
  const put = (input, files) => {
    const transfer = new DataTransfer();
    files.forEach((file) => transfer.items.add(file));
    input.files = transfer.files;
  };
  const sift = (files, isQuery) => {
    let good = files.filter((file) => file.size <= MOST_BYTES);
    const large = files.filter((file) => file.size > MOST_BYTES).map((file) => [file.name, file.size]);
    f2b.refused.large = [...f2b.refused.large, ...large].slice(0, MOST_FILES);
    f2b.refused.query ||= isQuery;
    if (good.length > MOST_FILES) { f2b.refused.count = good.length; good = []; }
    if (!good.length) document.querySelector('#f2b-refuse')?.click();
    return good;
  };
  // The widget takes no files while those before arrive; after ten seconds without that they have failed.
  const isBusy = () => f2b.adding >= MOST_WAITING || Date.now() - f2b.sent < 10000;
  const isBad = (files) => files.length > MOST_FILES || files.some((file) => file.size > MOST_BYTES);
  document.addEventListener('change', (event) => {
    const input = event.target;
    if (!input.matches?.('input[type=file]')) return;
    if (isBad([...input.files])) {
      const good = sift([...input.files], isQuery(input));
      put(input, good);
      if (!good.length) { event.stopImmediatePropagation(); return; }
    }
    if (isQuery(input)) return;
    if (!isBusy()) { f2b.sent = Date.now(); f2b.before = f2b.removals; return; }
    event.stopImmediatePropagation();
    add([...input.files]);
    input.value = '';
  }, true);
  let waits;
  const widget = () => document.querySelector('#f2b-upload input[type=file]');  // none while it uploads
  const give = () => {
    clearTimeout(waits);
    tell();
    if (!f2b.held.length) return;
    const input = widget();
    if (!input || isBusy()) { waits = setTimeout(give, 100); return; }
    put(input, f2b.held.shift());
    input.dispatchEvent(new Event('change', { bubbles: true }));
    give();
  };
  const add = (files) => { f2b.held.push(files); give(); };
  document.addEventListener('dragover', (event) => {  // else there is no drop: the browser would open the file
    if (event.target.closest?.('#f2b-upload') && !widget()) event.preventDefault();
  }, true);
  document.addEventListener('drop', (event) => {
    const files = [...(event.dataTransfer?.files ?? [])];
    if (!files.length || !event.target.closest?.('#f2b-upload')) return;
    if (!isBad(files) && !isBusy() && widget()) { f2b.before = f2b.removals; return; }
    event.preventDefault();
    event.stopImmediatePropagation();
    event.target.dispatchEvent(new DragEvent('dragleave', { bubbles: true }));
    add(files);
  }, true);
  // A picture that is pasted anywhere in the page goes where chosen files go.
  document.addEventListener('paste', (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    if (files.length) add(files);
  });
  const fill = (box, words) => { box.value = words; box.dispatchEvent(new Event('input', { bubbles: true })); };
  const plain = (words) => words.split(/\\s+/).filter(Boolean).join(' ');
  f2b.ask = (words) => { f2b.asked.add(plain(words)); return words; };
  // A question leaves its box when it first appears in the conversation; what was typed since stays.
  f2b.answered = () => {
    const turn = [...document.querySelectorAll('#f2b-talk .f2b-turn')].at(-1);
    const box = document.querySelector('#f2b-question textarea');
    const words = turn && plain(turn.querySelector('.f2b-question').textContent);
    if (!turn || !box || !f2b.asked.delete(words) || plain(box.value) !== words) return;
    fill(box, '');
    turn.scrollIntoView({ block: 'nearest' });
  };
  const boxes = () => [...document.querySelectorAll('#f2b-ask-pick input[type=checkbox]')];
  const count = () => {
    f2b.ticked = new Set(boxes().filter((one) => one.checked).map((one) => one.value));
    const number = f2b.ticked.size;
    const most = number > MOST_ASKED ? `; at most ${MOST_ASKED} can be asked about` : '';
    const words = `${number || 'No'} picture${number > 1 ? 's' : ''} chosen${most}.`;
    const place = document.querySelector('#f2b-count p');
    if (place && place.textContent !== words) place.textContent = words;
  };
  f2b.tick = () => { boxes().forEach((one) => { one.checked ||= f2b.ticked.has(one.value); }); count(); };
  document.addEventListener('change', (event) => { if (event.target.closest?.('#f2b-ask-pick')) count(); });
  document.addEventListener('click', (event) => {
    const one = event.target.closest?.('.f2b-try');
    if (!one) return;
    const { words, picture, box, button } = one.dataset;
    if (picture) { boxes().forEach((tick) => { tick.checked = tick.value === picture; }); count(); }
    fill(document.querySelector(`${box} textarea`), words);
    setTimeout(() => document.querySelector(button).click());
  });
}"""
PAGE = f"() => ({_PAGE})({MAX_FILE_BYTES}, {MAX_FILES}, {MAX_ASKED}, {MAX_WAITING_OF_ONE})"
REFUSED = "window.f2b.refusals()"
KEEP_ARRIVED = "(files) => window.f2b.arrive(files)"
ARRIVED = "window.f2b.next()"
REMOVALS_BEFORE = "window.f2b.batch.removals"  # of what `ARRIVED` gave
ADDED = "() => window.f2b.added()"
REMOVE = "window.f2b.remove()"
FOCUS_UPLOAD = "() => { document.querySelector('#f2b-upload button')?.focus(); return []; }"
ASK = "window.f2b.ask(x0)"
CONVERSATION = "window.f2b.conversation"
NEXT_CONVERSATION = "++window.f2b.conversation"


def ticked(place: str) -> str:
    """JavaScript: the ids of the pictures that are ticked in a place."""
    return f"[...document.querySelectorAll('{place} input:checked')].map((one) => one.value)"


def given(count: int, **values: str) -> str:
    """JavaScript that puts values among `count` inputs: `given(3, x1="window.f2b.conversation")`."""
    names = [f"x{index}" for index in range(count)]
    return f"({', '.join(names)}) => [{', '.join(values.get(name, name) for name in names)}]"
