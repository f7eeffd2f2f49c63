"""The page at GET /, as somebody uses it in Chromium: page_check.py SERVE_FAKE AXE_JS [SHOTS]

Against fake servers of both dialects that answer word by word: a chat, thoughts and calls, stop, errors,
schemas, edit and resend, a reload and a lost connection in the middle of an answer, the queue, keys, stored
responses; the keyboard alone; light, dark and 360 pixels wide, where axe-core must find nothing serious.
Nothing may break the page's Content-Security-Policy, no script may throw. SHOTS: a folder for screenshots.
Needs PyPI's playwright, a chromium in the PATH and axe.min.js of npm's axe-core.
"""
import json
import pathlib
import re
import shutil
import subprocess
import sys
import time

from playwright.sync_api import expect, sync_playwright

fake, axe = sys.argv[1], pathlib.Path(sys.argv[2]).read_text(encoding="utf-8")
shots = pathlib.Path(sys.argv[3]) if len(sys.argv) > 3 else None
key = "sk-valar-page-0123456789"
long_text = "one two three four five six seven eight nine ten " * 16  # some 4 s of words
tools = json.dumps([{"type": "function", "name": "get_weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}])
processes, checks = [], 0


def check(condition, what):
    global checks
    checks += 1
    assert condition, what


def serve(dialect, api_key="", pace_ms=25, port=0):
    """The port of a new server, and its process."""
    process = subprocess.Popen([fake, str(port), api_key, dialect, "", "0", str(pace_ms)],
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    processes.append(process)
    return int(process.stdout.readline()), process


class Tab:
    """One tab of a fresh browser, and what a person does in it."""

    def __init__(self, browser, port, **context):
        self.context = browser.new_context(**context)
        self.page = self.context.new_page()
        self.faults = []
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", lambda line: self.faults.append(line.text)
                     if "Content Security" in line.text else None)
        self.page.goto(f"http://127.0.0.1:{port}/")

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if not kind:
            check(not self.faults, self.faults)
        self.context.close()

    def find(self, selector):
        return self.page.locator(selector)

    def button(self, name):
        return self.page.get_by_role("button", name=name, exact=True)

    def ask(self, text):
        expect(self.button("Send")).to_be_enabled()
        self.find("#prompt").fill(text)
        self.button("Send").click()

    def answer(self):
        """The last one, once it is over."""
        expect(self.button("Send")).to_be_visible(timeout=20_000)
        return self.find("article.assistant").last

    def open_settings(self):
        if not self.find("#fields").is_visible():
            self.find("#settings > summary").click()

    def set(self, name, value):
        self.open_settings()
        field = self.find(f"#fields [name={name}]")
        if name in ("format", "choice", "effort", "model"):
            field.select_option(value)
        else:
            field.fill(value)

    def request(self):
        """What the page says it sent."""
        text = self.find("article.assistant details.request pre").last.text_content()
        return json.loads(re.search(r"--data '(.*)'$", text, re.S)[1].replace("'\\''", "'"))

    def look(self, name):
        """axe-core's findings, and a picture."""
        found = self.page.evaluate("(source) => { (0, eval)(source); return axe.run(); }", axe)
        bad = [one for one in found["violations"] if one["impact"] in ("serious", "critical")]
        check(not bad, [(name, one["id"], one["nodes"][0]["html"], one["help"]) for one in bad])
        width = self.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        check(width[0] <= width[1], f"{name}: wider than the window: {width}")
        if shots:
            self.page.screenshot(path=shots / f"{name}.png")


def chat(browser, port, dialect):
    with Tab(browser, port) as tab:
        expect(tab.find("[name=model] option")).to_have_text(["org/fake-1", "fake"])
        tab.set("model", "fake")
        tab.set("system", "Be brief, it's late.")
        tab.set("temperature", "0.5")
        tab.set("limit", "60")
        tab.ask("hello <b>there</b>, it's me")
        answer = tab.answer()
        expect(answer.locator(".text")).to_contain_text("hello <b>there</b>, it's me")
        expect(answer).to_contain_text(re.compile(r"\d+ tokens read · \d+ written · first after [\d.]+ s · "
                                                  r"[\d.]+ tokens/s"))
        sent = tab.request()
        limit = "max_output_tokens" if dialect == "openai" else "max_completion_tokens"
        check((sent["model"], sent["temperature"], sent[limit]) == ("fake", 0.5, 60), sent)
        check("Be brief, it's late." in json.dumps(sent), sent)
        tab.ask("and again")
        expect(tab.answer().locator(".text")).to_contain_text("and again")
        check(len(tab.request()["input" if dialect == "openai" else "messages"]) >= 3, tab.request())

        # The line for a shell does what it says.
        line = tab.find("article.assistant details.request pre").last.text_content()
        shown = subprocess.run(["sh", "-c", line + " --silent --show-error"], capture_output=True, text=True)
        check("and" in shown.stdout and "data: " in shown.stdout, shown)

        # Edit the first question: what came after it is gone.
        tab.button("Edit").first.click()
        tab.page.get_by_label("Edited message").fill("other words")
        tab.button("Send again").click()
        expect(tab.answer().locator(".text")).to_contain_text("other words")
        expect(tab.find("article")).to_have_count(2)
        tab.button("Answer again").click()
        tab.answer()
        expect(tab.find("article")).to_have_count(2)

        # A limit cuts; New chat forgets.
        tab.set("limit", "2")
        tab.ask("one two three four")
        expect(tab.answer()).to_contain_text("cut by the limit of tokens")
        tab.button("New chat").click()
        expect(tab.find("article")).to_have_count(0)


def stop(browser, port, dialect):
    with Tab(browser, port) as tab:
        tab.ask(long_text)
        expect(tab.find("article.assistant .text")).to_contain_text("two")
        tab.page.keyboard.press("Escape")
        answer = tab.answer()
        expect(answer).to_contain_text("stopped")
        words = answer.locator(".text").text_content().split()
        check(2 < len(words) < 161, words)
        tab.ask("go on")  # what had come is part of the conversation
        tab.answer()
        check("echo: one two" in json.dumps(tab.request()), tab.request())


def errors(browser, port, dialect):
    with Tab(browser, port) as tab:
        tab.set("temperature", "3")
        tab.ask("hello")
        expect(tab.answer().get_by_role("alert")).to_contain_text("'temperature' must be")
        tab.set("temperature", "")
        tab.set("tools", "[{")
        expect(tab.find("#tools-fault")).to_contain_text("Not usable")
        tab.find("#prompt").fill("hello")
        tab.button("Send").click()
        expect(tab.find("#state")).to_contain_text("not usable")
        expect(tab.find("[name=tools]")).to_be_focused()
        check(tab.find("#prompt").input_value() == "hello", "the message is lost")
        tab.set("tools", '[{"type": "function", "name": "not a name"}]')
        tab.ask("hello")
        expect(tab.answer().get_by_role("alert")).to_contain_text("name")


def formats(browser, port, dialect):
    with Tab(browser, port) as tab:
        tab.set("format", "schema")
        tab.ask("hello")
        tab.answer()
        sent = tab.request()
        given = sent["text"]["format"] if dialect == "openai" else sent["response_format"]["json_schema"]
        check(given["strict"] and given["schema"]["required"] == ["name", "count"], sent)
        tab.set("schema", "[1]")
        tab.ask("hello")
        expect(tab.answer().get_by_role("alert")).to_be_visible()


def calls(browser, port, dialect):
    with Tab(browser, port) as tab:
        tab.set("tools", tools)
        tab.ask("How is the weather?")
        answer = tab.answer()
        thoughts = answer.locator("details").first
        check(thoughts.get_attribute("open") is None, "thoughts are not folded")
        thoughts.locator("summary").click()
        expect(thoughts.locator("p")).to_have_text("hm")
        expect(answer.locator(".call")).to_contain_text("Calls get_weather")
        expect(answer.locator(".call pre")).to_have_text('{"city": "Oslo"}')
        tab.page.get_by_label("Result of get_weather").fill("Rain, 7 degrees")
        tab.look(f"call-{dialect}")
        tab.button("Send results").click()
        expect(tab.answer().locator(".text")).to_contain_text("Rain, 7 degrees")
        check("call_fake0" in json.dumps(tab.request()), tab.request())


def reloads(browser, port, dialect):
    with Tab(browser, port) as tab:
        tab.ask(long_text)
        expect(tab.find("article.assistant .text")).to_contain_text("two")
        tab.page.reload()
        expect(tab.button("Stop")).to_be_visible()
        expect(tab.find("article.assistant .text")).to_contain_text("two")
        expect(tab.answer().locator(".text")).to_have_text("echo: " + long_text, timeout=20_000)
        expect(tab.find("article")).to_have_count(2)
        check("first after" not in tab.answer().text_content(), "a time that was not measured")
        tab.page.reload()  # what is over is not asked for again
        expect(tab.answer().locator(".text")).to_have_text("echo: " + long_text)
        tab.button("New chat").click()
        tab.page.reload()
        expect(tab.find("article")).to_have_count(0)


def lost(browser, _, dialect):
    """A server that dies in the middle, and comes back without a memory."""
    port, process = serve(dialect)
    with Tab(browser, port) as tab:
        tab.ask(long_text)
        expect(tab.find("article.assistant .text")).to_contain_text("two")
        process.kill()
        process.wait()
        expect(tab.find("#state")).to_contain_text("trying again")
        serve(dialect, port=port)
        expect(tab.answer().locator(".text")).to_have_text("echo: " + long_text, timeout=30_000)


def queue(browser, port, dialect):
    with Tab(browser, port) as first, Tab(browser, port) as second, Tab(browser, port) as third:
        for tab, state in ((first, "Answering"), (second, "next in turn"), (third, "at most 1 ahead of it")):
            tab.ask(long_text * 4)
            expect(tab.find("#state")).to_contain_text(state)
        second.button("Stop").click()
        expect(second.answer()).to_contain_text("stopped")
        expect(third.find("#state")).to_contain_text("next in turn")
        for tab in (first, third):
            tab.button("Stop").click()
            tab.answer()


def keys(browser, _, dialect):
    port, _ = serve(dialect, key)
    with Tab(browser, port) as tab:
        expect(tab.find("#key-dialog")).to_be_visible()
        tab.look(f"key-{dialect}")
        tab.find("#key").fill("sk-not-the-one-0123456789")
        tab.page.keyboard.press("Enter")
        expect(tab.find("#key-fault")).to_contain_text("unknown API key")
        tab.find("#key").fill(key)
        tab.page.keyboard.press("Enter")
        expect(tab.find("[name=model] option")).to_have_count(2)
        tab.ask("hello")
        expect(tab.answer().locator(".text")).to_have_text("echo: hello")
        curl = tab.find("details.request pre").last.text_content()
        check("Bearer $KEY" in curl and key not in curl, curl)
        check(tab.page.evaluate("localStorage.length + document.cookie.length") == 0, "kept for others")
        other = tab.context.new_page()  # another tab knows nothing of it
        other.goto(f"http://127.0.0.1:{port}/")
        expect(other.locator("#key-dialog")).to_be_visible()
        other.close()
        tab.button("API key").click()
        tab.page.keyboard.press("Enter")
        tab.page.reload()
        expect(tab.find("#key-dialog")).to_be_visible()


def stored(browser, port, dialect):
    with Tab(browser, port) as tab:
        asked = tab.page.evaluate("""async () => {
            const ask = async (input, background) => (await (await fetch('/v1/responses', {
                method: 'POST', headers: {'Content-Type': 'application/json'},
                body: JSON.stringify({model: 'fake', input, background, instructions: 'Be kind.'})
            })).json()).id;
            const first = await ask('in the background', true);
            await ask('in the foreground', false);
            return [first, await ask('a long one '.repeat(600), true)];
        }""")
        tab.button("Stored responses").click()
        tab.find("#only-background").check()
        one = tab.find("#list button").filter(has_text="in the background")
        expect(tab.find("#list button").filter(has_text="foreground")).to_have_count(0)
        one.click()
        expect(tab.find("#reading article")).to_have_text(
            ["System textBe kind.", "Asked by userin the background", "Answerecho: in the background"])
        expect(tab.find("#reading")).to_contain_text(asked[0])
        tab.look(f"stored-{dialect}")
        tab.find("#list button").first.click()  # the one that runs
        expect(tab.find("#reading")).to_contain_text(asked[1])
        tab.button("Cancel it").click()
        expect(tab.find("#reading")).to_contain_text("cancelled")
        tab.button("Delete").click()
        expect(tab.find("#reading article")).to_have_count(0)
        one.click()
        tab.button("Go on from here").click()
        expect(tab.find("article")).to_have_count(2)
        expect(tab.find("[name=system]")).to_have_value("Be kind.")
        tab.ask("more")
        expect(tab.answer().locator(".text")).to_contain_text("echo: in the background")


def keyboard(browser, port, dialect):
    """No pointer at all."""
    with Tab(browser, port) as tab:
        press, focus = tab.page.keyboard.press, lambda: tab.page.evaluate(
            "document.activeElement.id || document.activeElement.textContent")

        def tab_to(wanted, how="Tab"):
            for _ in range(60):
                if focus() == wanted:
                    return
                press(how)
            raise AssertionError(f"{wanted} cannot be reached")

        expect(tab.find("[name=model] option")).to_have_count(2)
        check(focus() == "prompt", "the message box is not where one begins")
        tab.page.keyboard.type("hello")
        press("Shift+Enter")
        tab.page.keyboard.insert_text("there " + long_text)
        press("Enter")
        expect(tab.find("article.assistant .text")).to_contain_text("two")
        tab_to("send")
        press("Enter")  # stops
        expect(tab.answer()).to_contain_text("stopped")
        tab_to("Edit", "Shift+Tab")
        press("Enter")
        tab.page.keyboard.press("Control+A")
        tab.page.keyboard.type("hi")
        tab_to("Send again")
        press("Enter")
        expect(tab.answer().locator(".text")).to_have_text("echo: hi")
        check(focus() == "prompt", focus())
        tab_to("Request", "Shift+Tab")
        press("Enter")
        expect(tab.find("details.request pre")).to_be_visible()
        tab_to("open-stored", "Shift+Tab")
        press("Enter")
        expect(tab.find("#list button").first).to_be_visible()
        press("Escape")
        check(focus() == "open-stored", focus())


def looks(browser, port, dialect):
    for name, context in (("light", {}), ("dark", {"color_scheme": "dark"}), ("narrow", {
            "viewport": {"width": 360, "height": 740}, "color_scheme": "light"})):
        with Tab(browser, port, **({"viewport": {"width": 1100, "height": 720}} | context)) as tab:
            tab.look(f"empty-{name}-{dialect}")
            tab.set("tools", tools)
            tab.ask("How is the weather? " + "w" * 200)
            tab.answer().locator("details").first.click()
            tab.page.get_by_label("Result of get_weather").fill("Rain")
            tab.button("Send results").click()
            tab.answer()
            tab.find("details.request summary").last.click()
            tab.look(f"chat-{name}-{dialect}")
            back = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
            check((int(re.search(r"\d+", back)[0]) < 100) == (name == "dark"), back)


with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
    expect.set_options(timeout=10_000)
    try:
        for dialect in ("valar", "openai"):
            port, _ = serve(dialect)
            ways = [chat, stop, errors, formats, calls, reloads, stored]
            rest = [queue, keyboard, looks, lost, keys]  # the same code in either dialect
            for test in ways + (rest if dialect == "valar" else []):
                started = time.monotonic()
                test(browser, port, dialect)
                print(f"{dialect}: {test.__name__}, {time.monotonic() - started:.1f} s", flush=True)
    finally:
        browser.close()
        for process in processes:
            process.kill()
print(f"page_check.py: {checks} checks and all that was expected")
