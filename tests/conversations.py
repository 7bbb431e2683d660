"""Conversations as agents have them, written for the parity tests: tool output, code, long instructions, forks.

Only the user's side is fixed; the assistant's turns are whatever the model under test answers. `SHORT` ones are a few
hundred characters a turn, `LONG` ones add up to about a thousand tokens of a real tokenizer.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Conversation:
    """What is said to the model, in order."""

    name: str
    turns: tuple[str, ...]
    system: str | None = None


def log_lines(num_lines: int, service: str) -> str:
    """Tool output of the regular kind that agents read by the page."""
    levels = ("INFO", "INFO", "WARN", "INFO", "ERROR")
    return "\n".join(
        f"12:{i % 60:02d}:{i * 7 % 60:02d} {levels[i % 5]:5} {service}[{4100 + i * 13}] took {i * 37 % 911} ms"
        for i in range(num_lines)
    )


_CODER = (
    "You are a coding agent. You see one file at a time, you change as little as needed, you run the tests after every "
    "change, and you never invent an interface that you have not read. Answer with one command or one short paragraph."
)
_TRAVEL = (
    "You are the booking agent of a small railway. Ask for the day, the two stations and the class; confirm before you "
    "book; never give away a seat that the list does not show as free. Refunds need the ticket number."
)
_PARSER = """def parse_line(line: str) -> tuple[str, int]:
    name, _, count = line.partition("=")
    if not count:
        raise ValueError(f"no count in {line!r}")
    return name.strip(), int(count)
"""
_SCHEMA = """CREATE TABLE parts (id INTEGER PRIMARY KEY, name TEXT NOT NULL, stock INTEGER NOT NULL DEFAULT 0);
CREATE TABLE orders (id INTEGER PRIMARY KEY, part INTEGER REFERENCES parts(id), amount INTEGER, placed_at TEXT);
"""
_SEATS = "coach 3: seats 11, 12, 45 free; coach 4: seats 2, 3, 4, 71 free; coach 5: no seat free, 2 standing places"

SHORT: tuple[Conversation, ...] = (
    Conversation(
        "fix-parser",
        (
            f"Tests fail in parse.py. This is the file:\n{_PARSER}",
            "FAILED test_parse.py::test_negative - assert parse_line('a=-3') == ('a', -3)\n1 failed, 7 passed in 0.11s",
            "Now the same for lines with a comment after #. Keep the function's signature as it is.",
            "All 9 passed. Write the commit message: one line, at most 60 characters.",
        ),
        _CODER,
    ),
    Conversation(
        "fix-parser-fork",
        (
            f"Tests fail in parse.py. This is the file:\n{_PARSER}",
            "FAILED test_parse.py::test_spaces - ValueError: invalid literal for int() with base 10: ' 3 x'",
            "Leave int() alone. Where would you strip instead, and why there?",
        ),
        _CODER,
    ),
    Conversation(
        "review-diff",
        (
            "Review this diff.\n"
            "-    for item in items:\n-        if item.id == wanted:\n-            return item\n"
            "+    return next((item for item in items if item.id == wanted), None)",
            "The caller does `find(items, 7).price`. Is the new version safe for it?",
            "Then propose the smallest change at the caller.",
            "And one test that fails before it.",
            "Good. Summarise the review in two sentences.",
        ),
        _CODER,
    ),
    Conversation(
        "train-to-the-coast",
        (
            "Two seats to the coast on Friday, second class, near each other please.",
            f"TOOL list_seats(Friday, 2) -> {_SEATS}",
            "Take the pair in coach 4, but not next to the door.",
            "TOOL book(4, [3, 4]) -> ok, ticket numbers KL-20931 and KL-20932",
        ),
        _TRAVEL,
    ),
    Conversation(
        "train-refund",
        (
            "Two seats to the coast on Friday, second class, near each other please.",
            f"TOOL list_seats(Friday, 2) -> {_SEATS}",
            "I changed my mind: refund KL-19004 first, I was ill that day.",
            "TOOL refund(KL-19004) -> refused: the ticket was used on 2 March",
            "Used? By whom? I was in hospital.",
        ),
        _TRAVEL,
    ),
    Conversation(
        "slow-service",
        (
            f"Why is checkout slow? Here is its log:\n{log_lines(12, 'checkout')}",
            f"And the log of the service behind it:\n{log_lines(9, 'ledger')}",
            "Which of both would you restart first? Say why in one sentence.",
        ),
    ),
    Conversation(
        "sql-report",
        (
            f"Given this schema:\n{_SCHEMA}List the parts that were never ordered.",
            "Now those with more ordered in the last 30 days than there are in stock.",
            "The planner reports: SCAN orders; SEARCH parts USING INTEGER PRIMARY KEY. Which index would help?",
            "CREATE INDEX took 41 s and the query 3 ms. Is it worth it at 20 inserts a second?",
        ),
    ),
    Conversation(
        "sql-migration",
        (
            f"Given this schema:\n{_SCHEMA}List the parts that were never ordered.",
            "Forget the list. Add a table for suppliers; a part has one or more of them.",
            "Write the migration back as well.",
        ),
    ),
    Conversation(
        "accents",
        (
            "Übersetze ins Deutsche: the bridge over the river is closed until the flood has passed.",
            "Und jetzt auf Französisch, bitte ohne »qu'on«: où est la clé de la fenêtre près de l'âtre?",
            "Češtiny se bojím nejvíc: příliš žluťoučký kůň úpěl ďábelské ódy. Co to znamená?",
        ),
    ),
    Conversation(
        "scripts",
        (
            "请翻译成英文。昨天的雨一直下到半夜。河水漫过了桥。",
            "Теперь по-русски: вчера дождь шёл до полуночи, и река вышла из берегов.",
            "日本語でも短くお願いします。丁寧語で、二文以内に。",
            "والآن بالعربية، في جملة واحدة فقط.",
        ),
    ),
    Conversation(
        "emoji-menu",
        (
            "Menu for Saturday: 🥕 soup, 🐟 with 🍋, 🍰. One guest can't eat nuts 🥜🚫. What do I buy?",
            "We are 7, not 4. 👨‍👩‍👧‍👦 come too.",
            "The market has no 🐟 today, only 🦑 and 🦐. Change the list.",
        ),
    ),
    Conversation(
        "json-tool",
        (
            'Call the weather tool: {"name": "weather", "parameters": {"city": "string", "days": "integer"}}',
            '{"city": "Turku", "days": [{"date": "05-01", "low": -2, "high": 6}, {"date": "05-02", "high": 9}]}',
            "Which of the days is warmer, and by how much? Answer as JSON with the keys day and difference.",
            "Invalid JSON: Expecting ',' delimiter: line 1 column 24 (char 23). Try once more.",
        ),
        "You speak to a program. Answer with one JSON value and nothing around it.",
    ),
    Conversation(
        "shell",
        (
            "$ df -h /srv\nDevice Size Used Avail Use% Mounted on\n/dev/sdb1   917G  871G  0  100% /srv\nFree 50G.",
            "$ du -xh --max-depth=1 /srv | sort -h | tail -4\n31G /srv/spool\n96G /srv/old\n212G /srv/mail\n871G /srv",
            "$ ls -la /srv/old | head -3\ntotal 100663336\n-rw------- 1 root root 51G Feb  2 2019 before-the-move.img",
            "Nobody knows what it is. What do you do before you delete it?",
        ),
    ),
    Conversation(
        "long-rules",
        (
            "Rules of the house. "
            + " ".join(
                f"Rule {i}: whoever {verb} after {hour} o'clock {duty}."
                for i, (verb, hour, duty) in enumerate(
                    (
                        ("cooks", 21, "closes the kitchen door"),
                        ("washes", 22, "waits until the morning with the spinning"),
                        ("comes home", 23, "carries the bicycle up the stairs"),
                        ("plays the piano", 20, "asks the second floor first"),
                        ("finds the cellar open", 19, "locks it and tells the caretaker"),
                        ("leaves for good", 12, "returns both keys and the small one"),
                    ),
                    start=1,
                )
            ),
            "It is half past nine in the evening and I want to cook. Which rules hold for me?",
            "And with the piano on?",
            "Which rule would you drop? One only.",
            "Write them again without it.",
        ),
    ),
    Conversation(
        "repeat-after-me",
        (
            "ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab",
            "ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab",
            "ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ac",
        ),
    ),
    Conversation(
        "one-word-turns",
        ("Hi.", "Why?", "No.", "Why not?", "."),
    ),
    Conversation(
        "stack-trace",
        (
            "Traceback (most recent call last):\n"
            '  File "/app/main.py", line 41, in <module>\n    run(load(sys.argv[1]))\n'
            '  File "/app/load.py", line 17, in load\n    return Config(**json.load(file))\n'
            "TypeError: Config.__init__() got an unexpected keyword argument 'retires'\nWhat is wrong?",
            "It is spelled `retries` in the class. Should load() accept both?",
            "Show how you would refuse unknown keys with a better message.",
        ),
        _CODER,
    ),
    Conversation(
        "letter",
        (
            "Dear editor,\n\nyour paper of 4 May says the weir was built in 1911. My grandmother was at its opening "
            "as a girl of nine with a wreath in her hair, and she was born in 1899. I keep the photograph.\n\n"
            "Please make this letter shorter without losing the photograph.",
            "Too short. Keep the wreath as well.",
            "Now the editor's answer, friendly, and admitting nothing.",
            "Again, admitting a little.",
        ),
    ),
    Conversation(
        "spreadsheet",
        (
            "month;rent;power;food\nJan;812.00;96.40;310.15\nFeb;812.00;91.75;288.60\nMar;812.00;83.10;341.05\n"
            "Apr;845.00;70.95;305.30\nWhat did the four months cost together?",
            "Which column grew the most from January to April, in percent?",
            "Add a row for May: rent as before, power down by a tenth, food the mean of the four.",
        ),
    ),
    Conversation(
        "game-master",
        (
            "You lead a game. I stand before a door of black oak; there is light under it, somebody sings behind it.",
            "I knock three times, as the old woman told me to, and hold the lantern low.",
            "I give my name as Ilse of the Ferry, which is not my name.",
            "Roll for me: the die shows 17.",
            "I run.",
        ),
        "Never speak for the player. Two sentences a turn at most. The singer must not be seen before the fifth turn.",
    ),
)

LONG: tuple[Conversation, ...] = (
    Conversation(
        "night-shift",
        (
            "You take over the night shift. Read the log of the evening, then tell me what to watch.\n"
            + log_lines(16, "gateway"),
            "Ten minutes later:\n" + log_lines(8, "gateway") + "\nIs it getting better or worse?",
            "Write the handover note for the morning shift, three sentences.",
        ),
    ),
    Conversation(
        "small-library",
        (
            "Explain what this module is for, and where it can fail.\n\n"
            f"{_PARSER}\n\ndef parse_file(path: str) -> dict[str, int]:\n"
            "    counts: dict[str, int] = {}\n    with open(path) as file:\n        for line in file:\n"
            "            name, count = parse_line(line)\n            counts[name] = counts.get(name, 0) + count\n"
            "    return counts\n\n\ndef merge(left: dict[str, int], right: dict[str, int]) -> dict[str, int]:\n"
            "    merged = dict(left)\n    for name, count in right.items():\n"
            "        merged[name] = merged.get(name, 0) + count\n    return merged\n\n\n"
            f"The schema that the counts are written to:\n\n{_SCHEMA}",
            "An empty line at the end of the file makes it fail. Where should that be handled: in parse_line, in "
            "parse_file, or by whoever writes the file? Weigh the three against each other before you decide.",
            "Decide now, in one sentence.",
        ),
        _CODER,
    ),
    Conversation(
        "valley-railway",
        (
            "A railway in a valley had seven stations. The first lay at the mouth of the river, where ferries came in; "
            "the last lay under the pass, and in winter nobody lived there but the keeper and two dogs. Between them "
            "the line crossed the water five times. The third bridge was of wood, and every spring, when the ice went "
            "out, a man walked ahead of the first train with a red flag and a long iron bar, and knocked at each beam, "
            "and listened. If it rang, he waved; if it was dull, the train went back, and the valley above had no "
            "mail until the carpenters had come. One year the man was ill, and his daughter went in his place. She was "
            "twelve. She knocked, and it rang, and she did not wave. The driver leaned out and shouted. She knocked "
            "again. Then she laid the flag across the rails and walked back to the train and said: it rings, but it "
            "rings higher than last year.\n\nTell me in your own words what happened, and why she did not wave.",
            "The company's report gives a different cause: the bolts had been drawn too tight in the autumn. Does that "
            "contradict the girl or support her?",
            "What would you have done as the driver? Answer in two sentences.",
        ),
    ),
)
