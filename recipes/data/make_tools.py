"""Writes tools.train.jsonl.gz and tools.test.jsonl: what people say to a home assistant, answered by calls of tools.

    python recipes/data/make_tools.py        # the same files every time

Held-out requests have other phrasings than those learned, and other cities, rooms, events and numbers.
"""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
TRAIN_ROWS, TEST_ROWS, SEED = 400, 60, 7
Arguments = dict[str, Any]


def tool(name: str, description: str, **properties: dict[str, Any]) -> dict[str, Any]:
    """A tool as OpenAI describes it, all arguments required."""
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TEXT, NUMBER = {"type": "string"}, {"type": "integer"}
TOOLS = [
    tool("set_timer", "Start a timer", minutes=NUMBER),
    tool("set_light", "Brightness of a lamp in percent, 0 is off", room=TEXT, percent=NUMBER),
    tool("get_weather", "Weather forecast", city=TEXT, day={"type": "string", "enum": ["today", "tomorrow"]}),
    tool("add_event", "Put an event on the calendar", title=TEXT, day=TEXT, time={**TEXT, "description": "24 hours"}),
]
# of each, those to learn from and those held out
CITIES = (
    ("London", "Berlin", "Madrid", "Tokyo", "Cairo", "Boston", "Chicago", "Athens", "Dublin", "Prague", "Sydney"),
    ("Oslo", "Rome", "Toronto", "Vienna", "Lisbon", "Denver"),
)
ROOMS = (
    ("kitchen", "bedroom", "living room", "hall", "bathroom", "office", "garage", "nursery", "cellar"),
    ("attic", "dining room", "study", "guest room"),
)
EVENTS = (
    ("dentist", "team meeting", "yoga class", "piano lesson", "dinner with Anna", "haircut", "book club",
     "parents' evening", "car inspection", "lunch with Tom"),
    ("eye doctor", "swimming lesson", "coffee with Maria", "chess club", "job interview"),
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MINUTES = ((1, 2, 3, 5, 6, 8, 10, 12, 15, 18, 20, 25, 30, 40, 45, 60, 90), (4, 7, 9, 11, 14, 22, 35, 50))
PERCENTS = ((5, 10, 20, 25, 30, 40, 50, 60, 75, 80, 100), (15, 35, 45, 55, 70, 90))
CLOCK = ((("9:00", "09:00"), ("8:30", "08:30"), ("10:15", "10:15"), ("11:00", "11:00"), ("14:00", "14:00"),
          ("15:30", "15:30"), ("17:45", "17:45"), ("19:00", "19:00"), ("20:15", "20:15")),
         (("9:30", "09:30"), ("10:45", "10:45"), ("13:30", "13:30"), ("16:00", "16:00"), ("18:15", "18:15")),
)  # fmt: skip
PHRASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "set_timer": (
        ("Set a timer for {minutes} minutes.", "Timer, {minutes} minutes please.", "Wake me in {minutes} minutes.",
         "Start a {minutes} minute timer.", "Can you count down {minutes} minutes?", "{minutes} minutes, starting now.",
         "I need a timer: {minutes} min.", "Remind me in {minutes} minutes."),
        ("The eggs need {minutes} minutes, let me know.", "Please time {minutes} minutes for me.",
         "Give me a shout after {minutes} minutes."),
    ),
    "set_light": (
        ("Set the {room} light to {percent} percent.", "Dim the lamp in the {room} to {percent}%.",
         "{room} lights at {percent} percent, please.", "Make the {room} {percent}% bright.",
         "I want {percent} percent light in the {room}.", "Could you put the {room} lamp on {percent}%?",
         "Switch the {room} light off.", "Turn off the lamp in the {room}."),
        ("Bring the lamp in the {room} to {percent} percent.", "The {room} should have {percent}% light.",
         "No more light in the {room}: off."),
    ),
    "get_weather": (
        ("What is the weather in {city} {day}?", "Weather for {city} {day}.", "Will it rain {day} in {city}?",
         "How warm will it be in {city} {day}?", "Is it sunny in {city} {day}?", "Forecast for {city}, {day} please.",
         "Do I need an umbrella {day} in {city}?", "Tell me how the weather is {day} in {city}."),
        ("I am in {city} {day}, do I need a coat?", "{city} {day}: sun or clouds?",
         "What will the sky over {city} look like {day}?"),
    ),
    "add_event": (
        ("Add {title} on {day} at {time}.", "I have {title} {day} at {time}.",
         "Put {title} in my calendar, {day} {time}.", "Book {title} for {day} at {time}.",
         "{title} is on {day} at {time}, note it down.",
         "Schedule {title}: {day}, {time}.", "New event: {title}, {day} at {time}.",
         "Enter {title} for {time} on {day}."),
        ("Do not let me forget {title} on {day} at {time}.", "On {day} at {time} there is {title}, please save that.",
         "Reserve {day} {time} for {title}."),
    ),
}  # fmt: skip

GREETINGS = (("Hello", "Hi", "Hey there", "Good morning", "Good evening", "Thanks"), ("Howdy", "Good afternoon"))
TALK = (
    ("how are you?", "who are you?", "what can you do?", "nice to talk to you.", "that was great.",
     "you are a big help."),
    ("are you there?", "tell me about yourself.", "well done!"),
)  # fmt: skip
REPLY = "I can set timers and lamps, tell the weather and note events. What shall I do?"
TALK_EVERY = 11  # rows: what calls for no tool


def _timer(part: int, phrase: str, draw: random.Random) -> tuple[str, Arguments]:
    minutes = draw.choice(MINUTES[part])
    return phrase.format(minutes=minutes), {"minutes": minutes}


def _light(part: int, phrase: str, draw: random.Random) -> tuple[str, Arguments]:
    room, percent = draw.choice(ROOMS[part]), draw.choice(PERCENTS[part]) if "{percent}" in phrase else 0
    return phrase.format(room=room, percent=percent), {"room": room, "percent": percent}


def _weather(part: int, phrase: str, draw: random.Random) -> tuple[str, Arguments]:
    city, day = draw.choice(CITIES[part]), draw.choice(("today", "tomorrow"))
    return phrase.format(city=city, day=day), {"city": city, "day": day}


def _event(part: int, phrase: str, draw: random.Random) -> tuple[str, Arguments]:
    title, day, (said, time) = draw.choice(EVENTS[part]), draw.choice(DAYS), draw.choice(CLOCK[part])
    return phrase.format(title=title, day=day, time=said), {"title": title, "day": day, "time": time}


FILL: dict[str, Callable[[int, str, random.Random], tuple[str, Arguments]]] = {
    "set_timer": _timer,
    "set_light": _light,
    "get_weather": _weather,
    "add_event": _event,
}


def rows(part: int, count: int, draw: random.Random) -> list[dict[str, Any]]:
    """`count` different requests with their calls, of each tool alike; part 0 is to learn from, 1 is held out.

    One in TALK_EVERY is small talk, which is answered with REPLY.
    """
    found: dict[str, dict[str, Any]] = {}
    names = list(FILL)
    while len(found) < count:
        if len(found) % TALK_EVERY == TALK_EVERY - 1:
            said = f"{draw.choice(GREETINGS[part])}, {draw.choice(TALK[part])}"
            messages = [{"role": "user", "content": said}, {"role": "assistant", "content": REPLY}]
            found.setdefault(said, {"messages": messages, "tools": TOOLS})
            continue
        name = names[len(found) % len(names)]
        said, arguments = FILL[name](part, draw.choice(PHRASES[name][part]), draw)
        said = said[0].upper() + said[1:]
        call = {"id": "call_1", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        answer = {"role": "assistant", "content": None, "tool_calls": [call]}
        messages = [{"role": "user", "content": said}, answer]
        found.setdefault(said, {"messages": messages, "tools": TOOLS})
    written = list(found.values())
    draw.shuffle(written)
    return written


def lines(part: int, count: int) -> str:
    """The rows of one part as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows(part, count, random.Random(SEED + part)))  # noqa: S311


def main() -> None:
    (FOLDER / "tools.train.jsonl.gz").write_bytes(gzip.compress(lines(0, TRAIN_ROWS).encode(), mtime=0))
    (FOLDER / "tools.test.jsonl").write_text(lines(1, TEST_ROWS), encoding="utf-8")


if __name__ == "__main__":
    main()
