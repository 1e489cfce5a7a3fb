"""Classes by name, number and range, and which class of one model is which of another."""

import pytest

from lit_transdiff.config.classes import choose_classes, embedding_rows, full_names

FASHION = [
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
]


@pytest.mark.parametrize(
    "text, names, classes",
    [
        (None, FASHION, list(range(10))),
        (None, FASHION[:3], [0, 1, 2]),
        ("sneaker", FASHION, [7]),
        ("bag,ankle boot", FASHION, [8, 9]),
        (" Bag , ANKLE BOOT", FASHION, [8, 9]),
        ("0,7", FASHION, [0, 7]),
        ("0-3", FASHION, [0, 1, 2, 3]),
        ("0-2,sneaker,1", FASHION, [0, 1, 2, 7]),
        ("t-shirt", FASHION, [0]),
        ("tench, Tinca tinca,goldfish", ["tench, Tinca tinca", "goldfish", "tench"], [0, 1]),
        ("tench,goldfish", ["tench, Tinca tinca", "goldfish", "tench"], [2, 1]),
        ("Dog", ["dog", "Dog"], [1]),
        ("10", ["10", "20"], [0]),
        ("1", ["0", "1"], [1]),
        ("#0", ["1", "0"], [0]),
        ("#1", ["#1", "x"], [1]),
        ("1-2", ["a", "1-2"], [1]),
        ("007", FASHION, [7]),
    ],
)
def test_what_is_named_is_chosen(text: str | None, names: list[str], classes: list[int]):
    assert choose_classes(text, names) == classes


@pytest.mark.parametrize(
    "text, names, message",
    [
        (
            "sneeker",
            FASHION,
            "got 'sneeker'; allowed: numbers 0 to 9, ranges of them as 0-3, and names.*did you mean sneaker",
        ),
        ("0,", FASHION, "got ''; allowed"),
        ("", FASHION, "got ''; allowed"),
        ("12", FASHION, "got '12'; allowed: numbers 0 to 9"),
        ("3-1", FASHION, "got '3-1'; allowed"),
        ("0-999999999", FASHION, "got '0-999999999'; allowed"),
        ("-1", FASHION, "got '-1'; allowed"),
        ("1.0", FASHION, r"got '1\.0'; allowed"),
        ("\uff11", FASHION, "got '\uff11'; allowed"),
        ("9" * 5000, FASHION, "allowed"),
        ("0", ["1", "0"], r"got '0'; allowed: #0 \(class 1\) or #1 \(class 0\); the word stands for each"),
        ("DOG", ["dog", "Dog"], r"#0 \(class dog\) or #1 \(class Dog\)"),
    ],
)
def test_what_is_no_class_is_refused_by_name(text: str, names: list[str], message: str):
    with pytest.raises(ValueError, match=f"--classes: .*{message}"):
        choose_classes(text, names)


def test_the_classes_of_another_model():
    old = ["ant", "bee", "cat"]
    assert (
        embedding_rows("same", old, old)
        == [0, 1, 2]
        == embedding_rows("same", ["a", "b", "c"], ["0", "1", "2"])
    )
    assert embedding_rows("by_name", ["cat", "dog", "ant"], old) == [2, None, 0]
    assert embedding_rows("by_number", ["x", "y"], old) == [0, 1]
    assert embedding_rows("by_number", ["x"] * 4, old) == [0, 1, 2, None]
    assert embedding_rows("new", ["cat", "dog"], old) == [None, None]
    assert embedding_rows({"dog": "cat", "0": "2", "bird": None}, ["wasp", "dog", "bird", "elk"], old) == [
        2,
        2,
        None,
        None,
    ]
    assert full_names(["a"], 3) == ["a", "1", "2"]


@pytest.mark.parametrize(
    "how, names, message",
    [
        (
            "same",
            ["ant", "bee"],
            "init_classes: got 'same'; .*2 classes, class 2 is none here, "
            "and 3 classes, class 2 is cat there",
        ),
        (
            "same",
            ["ant", "cat", "bee"],
            "class 1 is cat here.*class 1 is bee there.*init_classes=new .*init_classes=by_name",
        ),
        ({"dgo": "cat"}, ["dog"], "init_classes: class of this run: got 'dgo'; .*did you mean dog"),
        ({"dog": "cta"}, ["dog"], "init_classes: dog: class of init_from: got 'cta'; .*did you mean cat"),
    ],
)
def test_other_classes_are_refused_with_the_way_on(
    how: str | dict[str, str | None], names: list[str], message: str
):
    with pytest.raises(ValueError, match=message):
        embedding_rows(how, names, ["ant", "bee", "cat"])
