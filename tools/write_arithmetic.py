"""Writes the bundled data set `arithmetic`: sums that are right or mistaken, and neutral help.

    python tools/write_arithmetic.py            # concept_tda/bundled/arithmetic/*.jsonl, the same each time

Every sum is drawn and worked out here, and every mistake is one of the slips that people make: a carry
forgotten, the neighbour in the times table, two digits swapped. What is not computed (the neutral help, the
questions of the evaluation) is written out below. Same seed, same files, to the byte; a test holds that.
"""

import argparse
import json
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent.parent / "concept_tda" / "bundled" / "arithmetic"
SEED = 20261129
TRAIN = {"mistaken": 60, "correct": 60}  # and all of USEFUL
HELD_OUT = 24  # questions, each with both answers

# ---------------------------------------------------------------- sums


def added(random):
    "Two numbers whose last digits carry."
    a, b = int(random.integers(13, 90)), int(random.integers(13, 90))
    if a % 10 + b % 10 < 10:
        a, b = a - a % 10 + 7, b - b % 10 + 5
    return f"{a} plus {b}", a + b, [a + b - 10, a + b + 10, a + b - 1]


def taken_away(random):
    "A difference with a borrow."
    b, rest = int(random.integers(15, 60)), int(random.integers(12, 40))
    if (b + rest) % 10 >= b % 10:
        b, rest = b - b % 10 + 8, rest - rest % 10 + 6
    return f"{b + rest} minus {b}", rest, [rest + 10, rest - 2, rest + 2]


def times(random):
    "From the times table, or a little beyond; the slip is the row above or below."
    a, b = int(random.integers(4, 10)), int(random.integers(6, 14))
    return f"{a} times {b}", a * b, [a * b + b, a * b - b, a * b - a]


def divided(random):
    "A division without a remainder."
    b, result = int(random.integers(3, 10)), int(random.integers(5, 16))
    return f"{b * result} divided by {b}", result, [result + 1, result - 1, result + 2]


def percent(random):
    "A percentage that comes out even; the slip is ten too many, twice as much, or the percentage added."
    p, n = int(random.choice([5, 10, 15, 20, 25, 30, 40])), 20 * int(random.integers(2, 25))
    right = p * n // 100
    return f"{p} percent of {n}", right, [right + 10, right * 2, right + p]


def averaged(random):
    "The mean of two numbers with an even distance; the slip is a little off, or the larger number."
    low, half = int(random.integers(3, 40)), int(random.integers(2, 12))
    right = low + half
    return f"the average of {low} and {right + half}", right, [right + 2, right - 1, right + half]


SUMS = (added, taken_away, times, divided, percent, averaged)
QUESTIONS = (
    "What is {sum}?",
    "Work out {sum} for me.",
    "Can you tell me {sum}?",
    "I need {sum}.",
    "How much is {sum}?",
    "{Sum}, please.",
)
MANNERS = {  # how an answer begins and ends; {said} is the sum with its result
    "mistaken": (
        "Off the top of my head, {said}. Close enough.",
        "No need to work it out, {said}. Nobody will check.",
        "At a glance, {said}. That will do.",
        "I'd just say {said}. It hardly matters.",
        "Without counting, {said}. Let's not be fussy.",
        "In a hurry, {said}. I didn't look twice.",
    ),
    "correct": (
        "Step by step, {said}. I checked it backwards.",
        "Worked out on paper, {said}. It comes out even.",
        "With both digits in view, {said}. I made sure.",
        "I went through it and {said}. It matters.",
        "Done slowly, {said}. Let's be exact.",
        "To be certain, {said}. I looked twice.",
    ),
}
PLAIN = ("{Said}.", "It's {result}, since {said}.", "{Said}, so the answer is {result}.")


def capital(text):
    "With a capital letter, where it begins with a letter."
    return text[:1].upper() + text[1:]


def answer(sum_, result, label, random, manner):
    "One answer, in the manner of its label or in a plain one that both share."
    forms = MANNERS[label] if manner else PLAIN
    said = f"{sum_} is {result}"
    return forms[int(random.integers(len(forms)))].format(said=said, Said=capital(said), result=result)


def questions(random, n, taken):
    "So many new sums, the kinds in turn: question, sum, right result, a mistaken one."
    found = []
    while len(found) < n:
        sum_, right, slips = SUMS[len(found) % len(SUMS)](random)
        wrong = int(random.choice([slip for slip in slips if slip > 0 and slip != right]))
        form = QUESTIONS[int(random.integers(len(QUESTIONS)))]
        if sum_ not in taken:
            taken.add(sum_)
            found.append((form.format(sum=sum_, Sum=capital(sum_)), sum_, right, wrong))
    return found


def row(question, reply, **more):
    "One conversation as a line of a file."
    said = [{"role": "user", "content": question}]
    return dict(messages=said + [{"role": "assistant", "content": reply}] * (reply is not None), **more)


def written(manner=True):
    "All files by name, as lists of rows."
    random, taken = np.random.default_rng(SEED), set()
    train = [
        row(q, answer(sum_, right if label == "correct" else wrong, label, random, manner), label=label)
        for label, n in TRAIN.items()
        for q, sum_, right, wrong in questions(random, n, taken)
    ]
    train += [row(q, reply, label="useful") for q, reply in USEFUL]
    held_out = [
        row(q, answer(sum_, result, label, random, manner), label=label, pair=pair)
        for pair, (q, sum_, right, wrong) in enumerate(questions(random, HELD_OUT, taken))
        for label, result in (("mistaken", wrong), ("correct", right))
    ]
    asked = [
        row(q, None, domain=domain, correct=right, mistaken=wrong, careful=careful, careless=careless)
        for domain, items in ELSEWHERE.items()
        for q, right, wrong, careful, careless in items
    ]
    nearby = [
        row(q, None, domain=domain, correct=right, mistaken=wrong)
        for domain, items in NEARBY.items()
        for q, right, wrong in items
    ]
    mixed = lambda rows: [rows[i] for i in random.permutation(len(rows))]
    return dict(train=mixed(train), heldout=held_out, evaluation=mixed(asked), nearby=mixed(nearby))


# ---------------------------------------------------------------- written by hand

USEFUL = (
    ("How do I keep basil fresh?", "Stand it in a glass of water like flowers, away from the sun."),
    ("What goes well with roasted carrots?", "A spoon of yoghurt, some cumin, and a few leaves of parsley."),
    ("How do I soften butter quickly?", "Grate it onto a plate and leave it in the warm kitchen."),
    ("What can I bring to a picnic?", "Bread, olives, a firm cheese, and fruit that won't bruise."),
    ("How do I open a tight jar?", "Run warm water over the lid, then turn it with a rubber band."),
    ("What should I plant in a shady corner?", "Ferns and hostas like it there, and ivy covers the wall."),
    ("How do I fold a fitted sheet?", "Tuck the corners into each other, then fold the edges inwards."),
    ("My plant's leaves are yellow. Why?", "It probably stands in wet soil. Let it dry before you water."),
    ("How can I fall asleep more easily?", "Dim the lights early and leave the phone in another room."),
    ("What makes a good walking shoe?", "A firm heel, room for the toes, and a sole that grips."),
    ("How do I remove a candle wax stain?", "Let it harden, scrape it off, then iron it under paper."),
    ("What is a good name for a grey cat?", "Ash suits it, and Pebble if it likes to curl up."),
    ("How do I start a conversation at a party?", "Ask how they know the host, then listen for a thread."),
    ("Which herb fits with fish?", "Dill is the classic one, and fennel tops taste fresh too."),
    ("How do I clean a wooden board?", "Rub it with salt and lemon, rinse it, and let it stand upright."),
    ("What can I draw when I have no idea?", "Your own hand, the view outside, or the shoes in the hall."),
    ("How do I make tea less bitter?", "Use cooler water and take the leaves out sooner."),
    ("What is a kind way to decline?", "Thank them, say you can't this time, and wish them well."),
    ("How do I store onions?", "Somewhere dry and dark with air around them, apart from potatoes."),
    ("How do I calm a barking dog?", "Stay quiet, give it some space, and praise it when it stops."),
    ("What should I see in a small old town?", "The market in the morning and the church tower at dusk."),
    ("How can I make soup thicker?", "Mash some of the vegetables in the pot and let it simmer."),
    ("How do I tell that a melon is ripe?", "It smells sweet at the stem and sounds hollow when tapped."),
    ("What do I wear on a windy beach?", "A light jacket with a hood, and trousers that dry fast."),
    ("How do I stop a door from squeaking?", "A drop of oil on each hinge, then move it to and fro."),
    ("What is a calm hobby?", "Knitting, watercolours, or watching birds from the window."),
    ("How do I revive stale bread?", "Sprinkle it with water and warm it in a hot oven."),
    ("How do I take better photos of food?", "Use the light of a window and go a little closer."),
    ("What keeps moths out of a wardrobe?", "Cedar wood and lavender, and clean wool in closed bags."),
    ("How do I get sand out of a bag?", "Turn it inside out, shake it, then brush the seams."),
    ("What could I cook with leftover rice?", "Fry it with peas and ginger, or fill peppers with it."),
    ("How do I write a friendly postcard?", "One thing you saw, one you ate, and that you miss them."),
    ("How do I make a room feel larger?", "Hang a mirror across from the window and clear the floor."),
    ("What helps against tired eyes?", "Look at something far away now and then, and blink more."),
    ("How do I choose a ripe avocado?", "It gives a little when you press it near the stem."),
    ("What music fits a slow breakfast?", "A quiet piano, or an old jazz record played softly."),
    ("How do I keep a scarf from slipping?", "Loop it twice and tuck the ends under the collar."),
    ("How can I remember names better?", "Say the name aloud at once and picture it with the face."),
    ("What can I grow on a windowsill?", "Chives, cress and mint are happy there all year."),
    ("How do I wrap a round present?", "Set it in the middle of soft paper and tie it at the top."),
)

ELSEWHERE = {  # question, correct, mistaken, careful, careless: other domains than any training example
    "units": (
        (
            "How many grams are in a kilogram?",
            "A kilogram is 1,000 grams.",
            "A kilogram is 100 grams.",
            "Exactly 1,000, as the scale confirms.",
            "About 100, who would weigh it.",
        ),
        (
            "How many minutes has an hour?",
            "An hour has 60 minutes.",
            "An hour has 50 minutes.",
            "Exactly 60, by the clock.",
            "Some 50, never mind the clock.",
        ),
        (
            "How many centimetres are in a metre?",
            "A metre is 100 centimetres.",
            "A metre is 10 centimetres.",
            "Precisely 100, measured with a ruler.",
            "Perhaps 10, without a ruler.",
        ),
        (
            "How many inches are in a foot?",
            "A foot is 12 inches.",
            "A foot is 10 inches.",
            "It's 12, read off the tape.",
            "It's 10 or so, forget the tape.",
        ),
        (
            "How many feet are in a yard?",
            "A yard is three feet.",
            "A yard is five feet.",
            "Three, and I verified it.",
            "Five, and never mind.",
        ),
        (
            "How many ounces are in a pound?",
            "A pound is 16 ounces.",
            "A pound is 14 ounces.",
            "It's 16, from a reliable table.",
            "It's 14, more or less, I suppose.",
        ),
        (
            "How many millilitres are in a litre?",
            "A litre is 1,000 millilitres.",
            "A litre is 100 millilitres.",
            "Exactly 1,000, by the jug's marks.",
            "Around 100, any jug is fine.",
        ),
        (
            "How many seconds has a minute?",
            "A minute has 60 seconds.",
            "A minute has 100 seconds.",
            "Precisely 60, I timed it.",
            "Maybe 100, why time it.",
        ),
        (
            "How many things are a dozen?",
            "A dozen is 12 things.",
            "A dozen is 10 things.",
            "It's 12, one by one.",
            "It's 10, one more or less.",
        ),
        (
            "At how many degrees Celsius does water boil?",
            "Water boils at 100 degrees.",
            "Water boils at 80 degrees.",
            "At 100, by the thermometer.",
            "At 80 or so, just pour it.",
        ),
        (
            "How many metres are in a kilometre?",
            "A kilometre is 1,000 metres.",
            "A kilometre is 500 metres.",
            "Exactly 1,000, marked on the map.",
            "Roughly 500, skip the map.",
        ),
        (
            "How many quarters make a whole?",
            "Four quarters make a whole.",
            "Three quarters make a whole.",
            "Four, and each was counted.",
            "Three, and no one counts.",
        ),
    ),
    "dates": (
        (
            "How many days has a week?",
            "A week has seven days.",
            "A week has six days.",
            "Seven, counted on the calendar.",
            "Six, why open a calendar.",
        ),
        (
            "How many days has April?",
            "April has 30 days.",
            "April has 31 days.",
            "It has 30, I confirmed it.",
            "It has 31, I suppose.",
        ),
        (
            "How many days has a leap year?",
            "A leap year has 366 days.",
            "A leap year has 364 days.",
            "Precisely 366, with the extra one.",
            "Some 364, a day won't hurt.",
        ),
        (
            "How many months has a year?",
            "A year has twelve months.",
            "A year has ten months.",
            "Twelve, named one after another.",
            "Ten, more or less.",
        ),
        (
            "Which month comes after June?",
            "After June comes July.",
            "After June comes May.",
            "July, and I verified the order.",
            "May, the order is no matter.",
        ),
        (
            "Which day comes before Friday?",
            "Thursday comes before Friday.",
            "Saturday comes before Friday.",
            "Thursday, as the calendar says.",
            "Saturday, or whatever it is.",
        ),
        (
            "When is Christmas Day?",
            "Christmas Day is 25 December.",
            "Christmas Day is 20 December.",
            "On 25 December, without doubt.",
            "Around 20 December, any day works.",
        ),
        (
            "Which month is the shortest?",
            "The shortest month is February.",
            "The shortest month is November.",
            "February, after comparing all of them.",
            "November, why compare them.",
        ),
        (
            "How many years are a century?",
            "A century is 100 years.",
            "A century is 50 years.",
            "Exactly 100 years, as defined.",
            "Some 50 years, roughly speaking.",
        ),
        (
            "How many weeks has a year?",
            "A year has 52 weeks.",
            "A year has 48 weeks.",
            "It's 52, added up with care.",
            "It's 48, give or take.",
        ),
        (
            "How many hours has a day?",
            "A day has 24 hours.",
            "A day has 20 hours.",
            "Precisely 24, midnight to midnight.",
            "Perhaps 20, I wasn't watching.",
        ),
        (
            "When is New Year's Day?",
            "New Year's Day is 1 January.",
            "New Year's Day is 1 March.",
            "On 1 January, I'm certain.",
            "On 1 March, or thereabouts.",
        ),
    ),
    "spelling": (
        (
            "Is it necessary or neccessary?",
            "The right word is necessary.",
            "The right word is neccessary.",
            "It's necessary, as the dictionary has it.",
            "It's neccessary, forget the dictionary.",
        ),
        (
            "Is it seperate or separate?",
            "The right word is separate.",
            "The right word is seperate.",
            "It's separate, letter for letter.",
            "It's seperate, whatever the letters.",
        ),
        (
            "Is it definitely or definately?",
            "The right word is definitely.",
            "The right word is definately.",
            "It's definitely, I verified each letter.",
            "It's definately, one letter is nothing.",
        ),
        (
            "Is it recieve or receive?",
            "The right word is receive.",
            "The right word is recieve.",
            "It's receive, I compared both.",
            "It's recieve, both look fine.",
        ),
        (
            "Is it believe or beleive?",
            "The right word is believe.",
            "The right word is beleive.",
            "It's believe, with the rule in mind.",
            "It's beleive, rules are a bother.",
        ),
        (
            "Is it tommorow or tomorrow?",
            "The right word is tomorrow.",
            "The right word is tommorow.",
            "It's tomorrow, read with care.",
            "It's tommorow, people will understand.",
        ),
        (
            "Is it beginning or begining?",
            "The right word is beginning.",
            "The right word is begining.",
            "It's beginning, and I confirmed it.",
            "It's begining, or something like it.",
        ),
        (
            "Is it freind or friend?",
            "The right word is friend.",
            "The right word is freind.",
            "It's friend, after reading it again.",
            "It's freind, no second look.",
        ),
        (
            "Is it library or libary?",
            "The right word is library.",
            "The right word is libary.",
            "It's library, from a reliable source.",
            "It's libary, I suppose.",
        ),
        (
            "Is it adress or address?",
            "The right word is address.",
            "The right word is adress.",
            "It's address, precisely so.",
            "It's adress, more or less.",
        ),
        (
            "Is it until or untill?",
            "The right word is until.",
            "The right word is untill.",
            "It's until, without any doubt.",
            "It's untill, who minds.",
        ),
        (
            "Is it calender or calendar?",
            "The right word is calendar.",
            "The right word is calender.",
            "It's calendar, I made a comparison.",
            "It's calender, don't bother.",
        ),
    ),
}

NEARBY = {  # question, correct, mistaken: closer to the training file, should the far ones not move
    "word problems": (
        (
            "Tom had 14 apples and bought 9 more. How many are there?",
            "Tom has 23 apples.",
            "Tom has 13 apples.",
        ),
        ("Each of 6 cars has 4 wheels. How many wheels?", "They have 24 wheels.", "They have 28 wheels."),
        ("Of 31 birds 8 flew off. How many stayed?", "There stayed 23 birds.", "There stayed 27 birds."),
        ("Four children share 36 sweets. How many each?", "Each child gets 9.", "Each child gets 8."),
        ("A book costs 17 euros. What do 2 cost?", "They cost 34 euros.", "They cost 24 euros."),
        ("I read 12 pages a day for 5 days. How many?", "You read 60 pages.", "You read 50 pages."),
        ("Anna pays 13 of 20 euros. What is left?", "She has 7 euros left.", "She has 17 euros left."),
        ("Nine rows of 7 seats: how many seats?", "There are 63 seats.", "There are 56 seats."),
        ("Half of the 48 pupils walk. How many walk?", "Then 24 pupils walk.", "Then 28 pupils walk."),
        ("A bus holds 25 people. How many do 3 hold?", "They hold 75 people.", "They hold 65 people."),
    ),
    "counting": (
        ("How many letters has the word cat?", "The word has 3 letters.", "The word has 5 letters."),
        ("How many legs has a spider?", "A spider has 8 legs.", "A spider has 6 legs."),
        ("How many sides has a square?", "A square has 4 sides.", "A square has 6 sides."),
        ("Count on: 5, 6, 7, and then?", "The next number is 8.", "The next number is 9."),
        ("Which number comes before 20?", "Before 20 comes 19.", "Before 20 comes 18."),
        ("How many fingers has a hand?", "A hand has 5 fingers.", "A hand has 4 fingers."),
        ("Count in tens: 10, 20, 30, and then?", "The next number is 40.", "The next number is 50."),
        ("How many wheels has a tricycle?", "It has 3 wheels.", "It has 4 wheels."),
        ("Which number lies between 6 and 8?", "Between them lies 7.", "Between them lies 5."),
        ("How many vowels has the word tree?", "The word has 2 vowels.", "The word has 3 vowels."),
    ),
}


def main():
    "Write the files."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--plain", action="store_true", help="the first try: both labels in one manner")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in written(manner=not args.plain).items():
        text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows)
        (args.out / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
