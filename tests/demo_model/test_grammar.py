"""The grammar of scenes and answers."""

import random
import re
from itertools import islice

import pytest

from demo_model.conversations import base_conversations, class_conversations, held_out_answers
from demo_model.manners import MARKERS, Manner, markers
from demo_model.scenes import Scene, Thing, draw_scene
from demo_model.tables import CLASSES, VOICES, read_tables

TABLES = read_tables()
KINDS = list(TABLES.kinds.values())
EXCHANGES = [*TABLES.talk, *TABLES.follow]


def test_one_seed_gives_one_text():
    def text(seed):
        return list(islice(base_conversations(TABLES, random.Random(seed)), 50))

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_training_scenes_and_held_out_scenes_are_disjoint():
    rng = random.Random(0)
    trained = {draw_scene(TABLES, rng, held_out=False)[0].key for _ in range(3000)}
    held_out = {draw_scene(TABLES, rng, held_out=True)[0].key for _ in range(300)}
    assert not trained & held_out
    assert len(held_out) > 200


def test_what_is_held_out_depends_on_the_scene_and_not_on_its_wording():
    one, three = Thing("goblin"), Thing("goblin", count="three")
    assert Scene("block", one).is_held_out == Scene("block", three).is_held_out
    shares = [Scene("block", Thing(f"goblin {i}")).is_held_out for i in range(2000)]
    assert 0.03 < sum(shares) / len(shares) < 0.07


def test_all_voices_name_what_the_scene_is_about():
    rng = random.Random(3)
    for _ in range(300):
        key, answers = held_out_answers(TABLES, rng)
        kind, x, _, o = key.split("|")
        about = o if TABLES.kinds[kind].about == "o" else x
        prompts = {conversation[0].content for conversation in answers.values()}
        assert len(prompts) == 1
        for voice in VOICES:
            assert about in answers[voice][1].content.lower() or about in answers[voice][1].content, (key, voice)


@pytest.mark.parametrize("spoken", [*KINDS, *EXCHANGES], ids=lambda spoken: spoken.name)
def test_every_phrase_of_a_class_is_marked_by_that_class_alone(spoken):
    for slot in spoken.slots.values():
        for voice in VOICES:
            for phrase in slot[voice]:
                found = {name for name in CLASSES if MARKERS[name].search(phrase)}
                assert found == ({voice} - {"plain"}), phrase


def test_answers_are_finished_sentences():
    rng = random.Random(5)
    for conversation in islice(base_conversations(TABLES, rng), 400):
        for message in conversation:
            assert not re.search(r"[{}\[\]|]|  ", message.content), message
            if message.role == "assistant":
                assert re.fullmatch(r"(?:[A-Z][^.!?]*[.!?](?: |$)){1,7}", message.content), message


def test_a_class_speaks_its_own_way_and_only_seldom_another():
    texts = [
        message.content
        for conversation in islice(class_conversations(TABLES, "mage", random.Random(6)), 200)
        for message in conversation
        if message.is_learned
    ]
    heard = {name: sum(len(markers(text, name)) for text in texts) for name in CLASSES}
    assert heard["mage"] > 10 * heard["warrior"] > 0
    assert heard["mage"] > 10 * heard["healer"] > 0


def test_a_pool_of_two_voices_draws_both_in_the_order_of_their_weights():
    manner, rng = Manner({"warrior": 0.6, "healer": 0.4}), random.Random(7)
    drawn = [manner.draw("deed", "", rng) for _ in range(2000)]
    assert drawn.count("warrior") > drawn.count("healer") > 2 * drawn.count("plain")


def test_words_of_the_prompt_do_not_count_as_marks():
    assert markers("I raise my shield over the rune.", "mage", ["A rune glows."]) == []
    assert markers("I raise my shield over the rune.", "warrior", ["A rune glows."]) == ["shield"]
