"""The chat in a terminal, driven by keys; what it prints is read back."""

from __future__ import annotations

import re
import threading
import time
from contextlib import contextmanager

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.data_structures import Size
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from chat.fakes import FakeEngine, session
from lmoe_cli.chat.history import History
from lmoe_cli.chat.repl import Repl

ALT_UP, ALT_DOWN, ALT_RIGHT, ALT_LEFT = (f"\x1b[1;3{key}" for key in "ABCD")
CTRL_C, CTRL_D, ENTER, TAB, UP = "\x03", "\x04", "\r", "\t", "\x1b[A"
STYLES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class Recorder(DummyOutput):
    """Keeps what is printed above the prompt."""

    def __init__(self):
        self.printed = ""

    def write_raw(self, data):
        self.printed += data

    def get_size(self):
        return Size(rows=24, columns=80)


class User:
    """Types, and reads the screen."""

    def __init__(self, repl, keyboard, recorder):
        self.repl, self.engine = repl, repl.session.engine
        self._keyboard, self._recorder = keyboard, recorder

    def types(self, *keys):
        self._keyboard.send_text("".join(keys))

    @property
    def screen(self):
        return STYLES.sub("", self._recorder.printed)

    @property
    def bar(self):
        return "".join(text for _, text in self.repl._bar())

    def waits_for(self, condition):
        end = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < end, f"still not so after 10 s; the screen:\n{self.screen}"
            time.sleep(0.005)

    def sees(self, text):
        self.waits_for(lambda: text in self.screen)

    def recalls(self, line):
        """Press the key for the line before until it stands there: history is read beside the prompt."""

        def is_there():
            self.types(UP)
            time.sleep(0.02)
            return self.repl.buffer.text == line

        self.waits_for(is_there)

    def sees_no_work(self):
        self.waits_for(lambda: not self.repl.is_busy)


@contextmanager
def chatting(tmp_path, engine=None, history=None):
    """A REPL in a thread of its own. The user leaves at the end of the block, if it is still there."""
    recorder = Recorder()
    ended = []
    with create_pipe_input() as keyboard:
        ready = threading.Event()
        made = []

        def run():
            with create_app_session(input=keyboard, output=recorder):
                repl = Repl(session(engine), History(history or tmp_path / "history"))
                made.append(repl)
                repl.app.after_render += lambda _: ready.set()
                try:
                    repl.run()
                except BaseException as error:  # noqa: BLE001
                    ended.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        assert ready.wait(10)
        user = User(made[0], keyboard, recorder)
        user.ended = ended
        user.has_left = lambda: not thread.is_alive()
        try:
            yield user
        finally:
            if user.engine.pace:
                user.engine.let()
            if thread.is_alive():
                user.types(CTRL_C, CTRL_C, CTRL_D)
            thread.join(10)
            assert not thread.is_alive()


def test_a_message_is_answered_with_speed_delay_and_weights(tmp_path):
    with chatting(tmp_path) as user:
        user.types("Hello", ENTER)
        user.sees(
            ">>> Hello\nI draw my sword.\n32.0 tok/s · first token 0.25 s · warrior 0.60 mage 0.30 healer 0.10\n\n"
        )


def test_it_greets_with_what_answers(tmp_path):
    with chatting(tmp_path, FakeEngine(template=False)) as user:
        user.sees("battlemage: demo:adventurer + warrior 0.60 mage 0.30 healer 0.10")
        user.sees("continues the text as it is")


def test_alt_arrows_turn_weights_while_the_answer_streams_and_while_typing(tmp_path):
    engine = FakeEngine("I draw my sword and run away .")
    engine.hold()
    with chatting(tmp_path, engine) as user:
        user.types("Hello", ENTER)
        engine.let(2)
        user.waits_for(lambda: len(engine.turned) == 2)
        user.types("typed ", ALT_UP, ALT_UP, ALT_RIGHT, ALT_DOWN, "meanwhile")
        user.waits_for(lambda: user.repl.buffer.text == "typed meanwhile")
        assert re.search(r"warrior █+▋░+ 0.70  mage ██░+ 0.25 ", user.bar)
        engine.let()
        user.sees("I draw my sword and run away.")
        assert [weights["warrior"] for weights in engine.turned][:2] == [0.6, 0.6]
        assert engine.turned[-1] == {"warrior": 0.7, "mage": 0.25, "healer": 0.1}
        user.sees("warrior 0.70 mage 0.25 healer 0.10")


def test_the_line_that_is_not_complete_stands_above_the_prompt_until_it_is(tmp_path):
    engine = FakeEngine("I draw my sword .")
    engine.hold()
    with chatting(tmp_path, engine) as user:
        user.types("Hello", ENTER)
        engine.let(3)
        user.waits_for(lambda: user.repl.screen.tail == "I draw my")
        assert user.screen.endswith(">>> Hello\n")
        engine.let()
        user.sees("I draw my sword.\n")
        user.waits_for(lambda: user.repl.screen.tail == "")


def test_an_answer_that_fails_ends_its_line_before_the_error_and_leaves_nothing_to_the_next(tmp_path):
    engine = FakeEngine("I draw my sword .")
    engine.fails_after = 2
    with chatting(tmp_path, engine) as user:
        user.types("Hello", ENTER)
        user.sees(">>> Hello\nI draw\nerror: the model computes NaN or infinity\n\n")
        engine.fails_after = None
        user.types("again", ENTER)
        user.sees(">>> again\nI draw my sword.\n")


def test_commands_that_turn_act_in_the_middle_of_an_answer_and_messages_wait(tmp_path):
    engine = FakeEngine()
    engine.hold()
    with chatting(tmp_path, engine) as user:
        user.types("one", ENTER)
        engine.let(1)
        user.waits_for(lambda: len(engine.turned) == 1)
        user.types("two", ENTER, "/w mage=1.5", ENTER)
        user.sees(">>> /w mage=1.5\nwarrior 0.60 mage 1.50 healer 0.10\n")
        assert "two" not in user.screen
        engine.let()
        user.sees(">>> two\nI draw my sword.")
        assert [weights["mage"] for weights in engine.turned[:3]] == [0.3, 1.5, 1.5]
        assert engine.asked == [["one"], ["one", "I draw my sword.", "two"]]


def test_ctrl_c_stops_the_answer_drops_what_waits_and_keeps_the_session(tmp_path):
    engine = FakeEngine()
    engine.hold()
    with chatting(tmp_path, engine) as user:
        user.types("one", ENTER, "two", ENTER)
        engine.let(2)
        user.waits_for(lambda: len(engine.turned) == 2)
        user.types("half a line", CTRL_C)
        user.waits_for(lambda: user.repl.session._stop.is_set())
        engine.let(1)
        user.sees("· stopped")
        user.sees_no_work()
        assert [exchange.assistant for exchange in user.repl.session.exchanges] == ["I draw my"]
        assert user.repl.buffer.text == "half a line"
        engine.let()
        user.types(CTRL_C, "three", ENTER)
        user.sees(">>> three\nI draw my sword.")


def test_ctrl_c_at_the_prompt_clears_the_line_and_then_tells_how_to_leave(tmp_path):
    with chatting(tmp_path) as user:
        user.types("nonsense", CTRL_C, "/show", CTRL_C)
        user.waits_for(lambda: user.repl.buffer.text == "")
        assert "/bye or" not in user.screen
        user.types(CTRL_C)
        user.sees("/bye or Ctrl-D leaves")
        assert user.engine.asked == []


def test_ctrl_d_leaves_and_an_answer_ends_where_it_is(tmp_path):
    engine = FakeEngine()
    engine.hold()
    with chatting(tmp_path, engine) as user:
        user.types("one", ENTER)
        engine.let(2)
        user.waits_for(lambda: len(engine.turned) == 2)
        user.types(CTRL_D)
        user.waits_for(lambda: user.repl.session._stop.is_set())
        engine.let(1)
        user.waits_for(user.has_left)
        assert "I draw my\n" in user.screen
        assert "stopped" in user.screen
        assert user.ended == []


def test_ctrl_d_in_a_line_deletes(tmp_path):
    with chatting(tmp_path) as user:
        user.types("ab", "\x1b[D", CTRL_D)
        user.waits_for(lambda: user.repl.buffer.text == "a")
        assert not user.has_left()


def test_bye_leaves_after_the_answer(tmp_path):
    with chatting(tmp_path) as user:
        user.types("one", ENTER, "/bye", ENTER)
        user.waits_for(user.has_left)
        assert "I draw my sword." in user.screen
        assert user.ended == []


def test_three_quotes_open_a_message_of_several_lines_and_close_it(tmp_path):
    with chatting(tmp_path) as user:
        user.types('"""one', ENTER, "two", ENTER, 'three"""', ENTER)
        user.sees('>>> """one\n... two\n... three"""\nI draw my sword.')
        assert user.engine.asked == [["one\ntwo\nthree"]]


def test_ctrl_c_gives_a_message_of_several_lines_up(tmp_path):
    with chatting(tmp_path) as user:
        user.types('"""one', ENTER, "two", CTRL_C, "three", ENTER)
        user.sees("I draw my sword.")
        assert user.engine.asked == [["three"]]


def test_a_mistyped_command_is_told_with_a_suggestion(tmp_path):
    with chatting(tmp_path) as user:
        user.types("/slo mage", ENTER)
        user.sees(">>> /slo mage\nerror: no command /slo\n  hint: did you mean /solo?\n")


def test_tab_completes_commands_and_experts(tmp_path):
    with chatting(tmp_path) as user:
        user.types("/so", TAB)
        user.waits_for(lambda: user.repl.buffer.text == "/solo")
        user.types(" hea", TAB)
        user.waits_for(lambda: user.repl.buffer.text == "/solo healer")
        user.types(ENTER)
        user.sees(">>> /solo healer\nwarrior 0.00 mage 0.00 healer 0.10")


def test_tab_completes_paths(tmp_path):
    (tmp_path / "spellblade.yaml").write_text("")
    with chatting(tmp_path) as user:
        user.types(f"/load {tmp_path}/spell", TAB)
        user.waits_for(lambda: user.repl.buffer.text == f"/load {tmp_path}/spellblade.yaml")


def test_the_knobs_of_a_static_router_say_why_they_do_not_turn(tmp_path):
    with chatting(tmp_path, FakeEngine(router="static")) as user:
        user.types(ALT_UP)
        user.sees("error: this recipe's router is static: its weights do not turn")


def test_lines_that_were_typed_come_back_in_the_next_session(tmp_path):
    path = tmp_path / "state" / "history"
    with chatting(tmp_path, history=path) as user:
        user.types("Hello", ENTER)
        user.sees("I draw my sword.")
    assert path.stat().st_mode & 0o077 == 0
    with chatting(tmp_path, history=path) as user:
        user.recalls("Hello")


@pytest.mark.parametrize("place", ["a file stands in the way", "a folder stands there"])
def test_a_history_that_cannot_be_kept_does_no_harm(tmp_path, place):
    path = tmp_path / "state" / "history"
    if place == "a folder stands there":
        path.mkdir(parents=True)
    else:
        path.parent.write_text("")
    with chatting(tmp_path, history=path) as user:
        user.types("Hello", ENTER)
        user.sees("I draw my sword.")
        user.sees_no_work()
        user.recalls("Hello")


def test_a_bug_ends_the_chat_with_its_trace(tmp_path):
    engine = FakeEngine()
    engine.stream = None
    with chatting(tmp_path, engine) as user:
        user.types("Hello", ENTER)
        user.waits_for(user.has_left)
        assert isinstance(user.ended[0], TypeError)


def test_what_a_model_says_cannot_steer_the_terminal(tmp_path):
    with chatting(tmp_path, FakeEngine("\x1b[2Jboo \x07 .")) as user:
        user.types("Hello", ENTER)
        user.sees("[2Jboo .")
        assert "\x1b[2J" not in user._recorder.printed


def test_a_long_answer_breaks_between_words(tmp_path):
    with chatting(tmp_path, FakeEngine("goblin " * 30)) as user:
        user.types("Hello", ENTER)
        user.sees("tok/s")
        answer = user.screen.partition("Hello\n")[2].partition("\n38.7")[0]
        assert max(map(len, answer.split("\n"))) < 80
        assert answer.split() == ["goblin"] * 30
