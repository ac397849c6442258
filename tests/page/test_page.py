"""The page in headless Chromium, with a server whose snapshots the test decides."""

import asyncio
import base64
import hashlib
import re
from contextlib import asynccontextmanager

import pytest

from tests.page.browser import Browser, executable
from tests.page.scene import Scene
from tests.page.server import PAGE, FakeServer
from tests.page.snapshots import TWO, cluster, migration, segment, worker

in_browser = pytest.mark.skipif(
    executable() is None, reason="no Chromium: apt-get install chromium, or any other Chrome"
)
TEXT = PAGE.read_text()


@pytest.fixture(scope="module")
def browser():
    browser = Browser()
    yield browser
    browser.close()


class Shown:
    """A page with its server. `now` is the snapshot that the server sends."""

    def __init__(self, now):
        self.now = now

    def snapshot(self):
        return self.now


@asynccontextmanager
async def page(browser, now=TWO, key="", prepare=lambda server: None, **media):
    shown = Shown(now)
    with FakeServer(shown.snapshot, key=key) as server:
        server.period_s = 0.05
        prepare(server)
        async with browser.tab(server.url, **media) as tab:
            tab.shown, tab.server = shown, server
            if not key:
                await tab.until("document.querySelector('.row')")
            yield tab
            assert not [e for e in tab.errors if "Failed to load resource" not in e], tab.errors


def shows(test):
    """Run an async test in a browser."""

    @in_browser
    def run(browser):
        asyncio.run(asyncio.wait_for(test(browser), 120))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


def text_of(selector):
    return f"document.querySelector('{selector}').textContent"


# --- without a browser ---


@pytest.mark.parametrize("tag", ["script", "style"])
def test_the_policy_of_the_page_allows_its_own_script_and_style_only(tag):
    (body,) = re.findall(f"<{tag}>(.*?)</{tag}>", TEXT, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
    assert f"{tag}-src 'sha256-{digest}'" in TEXT, f"the page must have {tag}-src 'sha256-{digest}'"
    assert "default-src 'none'" in TEXT and "unsafe" not in TEXT


def test_the_page_has_no_outside_asset_and_makes_no_markup_of_text():
    names = "http://www.w3.org/2000/svg"
    assert not re.search(r"https?://", TEXT.replace(names, ""))
    for forbidden in (
        "innerHTML",
        "outerHTML",
        "insertAdjacent",
        "document.write",
        "eval(",
        "@import",
    ):
        assert forbidden not in TEXT, forbidden
    assert not re.search(r"<[^>]+ (on\w+|style)=", TEXT), "the policy forbids such attributes"


def test_the_page_is_part_of_the_package():
    config = PAGE.parents[4].joinpath("pyproject.toml").read_text()
    assert "frontend/http/static/index.html" in config


# --- in a browser ---


@shows
async def test_the_bars_are_the_requests_and_the_figures_those_of_the_snapshot(browser):
    async with page(browser) as tab:
        await tab.until("document.querySelectorAll('.seg').length === 2")
        widths = "[...document.querySelectorAll('.seg')].map(s => [s.style.left, s.style.width])"
        assert await tab.run(widths) == [["0%", "10%"], ["10%", "30%"]]
        assert await tab.run(text_of("#tokens")) == "321"
        assert await tab.run(text_of("#active")) == "1of 2"
        assert await tab.run(text_of("#ttft")) == "120ms"
        assert await tab.run(text_of("#ttft-more")) == "p99 480 ms"
        assert await tab.run(text_of("#saved")) == "40%"
        assert "small · frugal · version 9.9" in await tab.run(text_of("#about"))
        assert await tab.run("document.querySelectorAll('.row')[1].dataset.is") == "parked"


@shows
async def test_the_colour_of_a_request_stays_when_it_moves(browser):
    async with page(browser) as tab:
        await tab.until("document.querySelectorAll('.seg').length === 2")
        colour = "getComputedStyle(document.querySelector('.seg[data-id=\"8\"]')).backgroundColor"
        before = await tab.run(colour)
        assert before != await tab.run(colour.replace('"8"', '"7"'))
        tab.shown.now = cluster(worker(1, segment(7)), worker(2, segment(8, 300)))
        await tab.until("document.querySelectorAll('.row')[1].querySelector('.seg')")
        assert await tab.run(colour) == before


@shows
async def test_a_move_is_drawn_once_and_leaves_a_row_and_a_point(browser):
    async with page(browser) as tab:
        await tab.until("document.querySelectorAll('.seg').length === 2")
        await tab.run(
            """window.drawn = 0; new MutationObserver(all => all.forEach(m => m.addedNodes.forEach(
            n => { window.drawn += n.nodeName === 'rect'; }))).observe(
            document.querySelector('#arcs'), {childList: true})"""
        )
        tab.shown.now = cluster(
            worker(1, segment(7)),
            worker(2, segment(8, 300)),
            migrations=[migration(8, 1, 2, at_s=5.0)],
        )
        await tab.until("window.drawn === 1")
        await tab.until("document.querySelector('.seg.landed')?.dataset.id === '8'")
        row = await tab.run("document.querySelector('#moves tbody tr').innerText")
        assert "1 → 2" in row and "50 ms" in row and "40 ms" in row and "4.0 MB" in row
        assert await tab.run("document.querySelectorAll('#scatter .dot').length") == 1
        await tab.until("!document.querySelector('#arcs').children.length")
        assert await tab.run("window.drawn") == 1


@shows
async def test_a_request_on_its_way_has_an_arc_and_a_place_at_its_destination(browser):
    now = cluster(worker(1, segment(7), segment(8, 300, to=2)), worker(2, segment(9)))
    async with page(browser, now) as tab:
        await tab.until("document.querySelector('#arcs .going')")
        ghost = "document.querySelectorAll('.row')[1].querySelector('.ghost').style"
        assert await tab.run(f"[{ghost}.left, {ghost}.width]") == ["10%", "30%"]
        assert await tab.run("document.querySelector('.seg[data-is=moving]').dataset.id") == "8"


@shows
async def test_with_reduced_motion_nothing_flies(browser):
    async with page(browser, still=True) as tab:
        await tab.until("document.querySelectorAll('.seg').length === 2")
        moved = [migration(8, 1, 2, at_s=5.0)]
        tab.shown.now = cluster(worker(1, segment(7)), worker(2, segment(8, 300)), migrations=moved)
        await tab.until("document.querySelector('.seg.landed')")
        assert await tab.run("document.querySelectorAll('#arcs rect').length") == 0
        assert await tab.run("document.querySelectorAll('#arcs path').length") == 1
        assert await tab.run("document.getAnimations().length") == 0


@shows
async def test_a_worker_is_drained_and_undrained(browser):
    async with page(browser) as tab:
        await tab.run("document.querySelector('.drain').click()")
        assert await asyncio.to_thread(tab.server.wait_for, "/v1/cluster/workers/1/drain") == {}
        await tab.until("document.querySelector('#said').textContent.includes('Worker 1')")
        held = worker(1, segment(7), state="draining", held=True)
        tab.shown.now = cluster(held, worker(2))
        await tab.until(f"{text_of('.drain')} === 'Undrain'")
        await tab.until("!document.querySelector('.drain').disabled")
        await tab.run("document.querySelector('.drain').click()")
        await asyncio.to_thread(tab.server.wait_for, "/v1/cluster/workers/1/undrain")


@shows
async def test_a_refusal_is_told(browser):
    def refuse(server):
        server.refusal = (409, "worker 1 is the <b>last</b> one")

    async with page(browser, prepare=refuse) as tab:
        await tab.run("document.querySelector('.drain').click()")
        await tab.until("document.querySelector('#said').textContent.includes('<b>last</b>')")


@shows
async def test_a_request_is_chosen_and_moved_by_keyboard(browser):
    now = cluster(worker(1, segment(7), segment(8, 300)), worker(2), worker(3))
    async with page(browser, now) as tab:
        await tab.until("document.querySelectorAll('.seg').length === 2")
        stops = "[...document.querySelectorAll('.seg')].map(s => s.tabIndex)"
        assert await tab.run(stops) == [0, -1]
        await tab.run("document.querySelector('.seg').focus()")
        await tab.press("ArrowRight")
        await tab.until("document.activeElement.dataset.id === '8'")
        await tab.until("!document.querySelector('#tip').hidden")
        assert "28 prompt + 5 output tokens" in await tab.run(text_of("#tip"))
        await tab.press("Enter", 13, "\r")
        await tab.until("!document.querySelector('#chosen').hidden")
        assert "Request 8" in await tab.run(text_of("#chosen .what"))
        await tab.run("document.querySelector('#chosen select').value = '3'")
        await tab.until("document.querySelector('#chosen select').value === '3'")
        await tab.run("document.querySelector('#chosen .main').click()")
        path = "/v1/cluster/requests/8/migrate"
        assert await asyncio.to_thread(tab.server.wait_for, path) == {"worker": 3}
        tab.shown.now = TWO | {"workers": [worker(1, segment(7)), worker(2)]}
        await tab.until("document.querySelector('#chosen .main').disabled")


@shows
async def test_the_focus_stays_on_a_segment_while_snapshots_come_and_goes_on_when_it_ends(browser):
    async with page(browser) as tab:
        await tab.until("document.querySelectorAll('.seg').length === 2")
        await tab.run("document.querySelector('.seg[data-id=\"7\"]').focus()")
        tab.shown.now = TWO | {"workers": [worker(1, segment(7, 200), segment(8, 300))]}
        await tab.until("document.querySelector('.seg[data-id=\"7\"]').style.width === '20%'")
        assert await tab.run("document.activeElement.dataset.id") == "7"
        tab.shown.now = TWO | {"workers": [worker(1, segment(8, 300))]}
        await tab.until("document.activeElement.dataset.id === '8'")


@shows
async def test_an_answer_streams_as_text_and_never_as_markup(browser):
    async with page(browser) as tab:
        await tab.run("document.querySelector('#prompt').value = 'How?'")
        await tab.run("document.querySelector('#prompt').focus()")
        await tab.press("Enter", 13, "\r")
        await tab.until("!document.querySelector('#send').disabled && " + text_of("#answer"))
        assert await tab.run(text_of("#answer")) == "".join(tab.server.answer)
        assert await tab.run("document.querySelectorAll('#answer b').length") == 0
        body = tab.server.wait_for("/v1/chat/completions")
        assert body["messages"] == [{"role": "user", "content": "How?"}] and body["stream"]
        assert body["model"] == "small" and body["max_tokens"] == 256
        assert "first after" in await tab.run(text_of("#pace"))


@shows
async def test_a_model_without_a_chat_template_completes_the_prompt(browser):
    def without(server):
        server.has_template = False

    async with page(browser, prepare=without) as tab:
        await tab.run("document.querySelector('#prompt').value = 'Once'")
        await tab.run("document.querySelector('#send').click()")
        await tab.until(f"{text_of('#answer')}.endsWith('decodes.')")
        assert tab.server.wait_for("/v1/completions")["prompt"] == "Once"


@shows
async def test_stop_ends_the_stream(browser):
    def slow(server):
        server.answer, server.piece_s = ["word "] * 10_000, 0.01

    async with page(browser, prepare=slow) as tab:
        await tab.run("document.querySelector('#prompt').value = 'Tell me all'")
        await tab.run("document.querySelector('#send').click()")
        await tab.until(f"{text_of('#answer')}.length > 20")
        await tab.run("document.querySelector('#stop').click()")
        await tab.until("!document.querySelector('#send').disabled")
        assert "stopped" in await tab.run(text_of("#pace"))
        assert await asyncio.to_thread(tab.server.disconnected.wait, 20)


@shows
async def test_a_key_is_asked_for_sent_and_kept_in_the_tab(browser):
    async with page(browser, key="secret") as tab:
        await tab.until("document.querySelector('#ask-key').open")
        assert "needs a key" in await tab.run(text_of("#key-why"))
        for given, opens in (("wrong", True), ("secret", False)):
            await tab.run(f"document.querySelector('#ask-key input').value = '{given}'")
            await tab.run("document.querySelector('#ask-key form').requestSubmit()")
            if opens:
                await tab.until(f"{text_of('#key-why')}.includes('is unknown')")
        await tab.until("document.querySelectorAll('.seg').length === 2")
        assert await tab.run("sessionStorage.getItem('mellmpi-key')") == "secret"
        assert await tab.run("localStorage.length") == 0
        await tab.run("document.querySelector('.drain').click()")
        await asyncio.to_thread(tab.server.wait_for, "/v1/cluster/workers/1/drain")


@shows
async def test_the_page_comes_back_by_itself_when_the_server_does(browser):
    shown = Shown(TWO)
    with FakeServer(shown.snapshot) as server:
        server.period_s, port = 0.05, server.port
        session = browser.tab(server.url)
        tab = await session.__aenter__()
        await tab.until("document.querySelectorAll('.seg').length === 2")
    try:
        await tab.until("document.body.classList.contains('stale')")
        assert await tab.run("document.querySelector('#status').dataset.is") == "down"
        # Moves that happened meanwhile are listed, but not drawn as if they happened now.
        shown.now = cluster(worker(1), worker(2, segment(7)), migrations=[migration(7, 1, 2, 9.0)])
        with FakeServer(shown.snapshot, port=port):
            await tab.until("!document.body.classList.contains('stale')")
            await tab.until("document.querySelectorAll('.row')[1].querySelector('.seg')")
            assert not await tab.run("document.querySelectorAll('#arcs rect, .landed').length")
            assert await tab.run("document.querySelectorAll('#moves tbody tr').length") == 1
    finally:
        await session.__aexit__(None, None, None)


@shows
async def test_a_job_that_is_not_ready_says_why(browser):
    starting = worker(1, state="starting", kv_capacity=0, step_ms=None)
    nothing = {"p50": None, "p99": None}
    now = cluster(starting, ready=False, reason="workers are starting", ttft_ms=nothing)
    async with page(browser, now) as tab:
        await tab.until(f"{text_of('#status')} === 'workers are starting'")
        assert await tab.run("document.querySelector('#status').dataset.is") == "waiting"
        assert await tab.run(text_of("#ttft-more")) == "no requests lately"


@shows
async def test_the_queue_is_shown_in_its_order_and_more_requests_than_are_listed_as_one(browser):
    many = worker(1, segment(7), num_requests=30, kv_bytes=900)
    now = cluster(many, waiting=(21, 22, 23))
    now["waiting"]["count"] = 40
    async with page(browser, now) as tab:
        await tab.until("document.querySelectorAll('#queue .one').length === 3")
        shown = await tab.run("[...document.querySelectorAll('#queue li')].map(l => l.innerText)")
        assert shown == ["Waiting", "21", "22", "23", "and 37 more"]
        rest = "document.querySelector('.rest')"
        assert await tab.run(f"[{rest}.style.left, {rest}.style.width]") == ["10%", "80%"]


@pytest.mark.parametrize("width", [320, 375, 768, 1280, 1920])
@in_browser
def test_nothing_is_wider_than_the_window(browser, width):
    async def look():
        scene = Scene()
        with FakeServer(lambda: scene.at(20.0)) as server:
            async with browser.tab(server.url, width=width) as tab:
                await tab.until("document.querySelectorAll('.seg').length > 3")
                wide = "Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)"
                assert await tab.run(wide) <= width

    asyncio.run(look())


@shows
async def test_every_control_has_a_name_and_can_be_reached_by_keyboard(browser):
    now = cluster(worker(1, segment(7), segment(8, 300)), worker(2), waiting=(9,))
    async with page(browser, now) as tab:
        await tab.until("document.querySelectorAll('.seg').length === 2")
        await tab.send("Accessibility.enable")
        tree = (await tab.send("Accessibility.getFullAXTree"))["nodes"]
        for node in tree:
            role = node.get("role", {}).get("value")
            if role in ("button", "textbox", "combobox", "spinbutton", "toolbar", "image"):
                assert node.get("name", {}).get("value"), node
        roles = [node.get("role", {}).get("value") for node in tree]
        assert roles.count("toolbar") == 2
        await tab.run("document.body.focus()")
        reached = set()
        for _ in range(16):
            await tab.press("Tab", 9)
            reached.add(
                await tab.run("document.activeElement.id || document.activeElement.className")
            )
        assert {"key", "drain", "seg", "prompt", "most", "send"} <= reached, reached
