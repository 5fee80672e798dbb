"""Forms of answers that are made to hurt: each with the status it gets, the parameter it is about, and what is said."""

from typing import Any

Form = tuple[dict[str, Any], int, str | None, str]
DEEP = "refer to one another too deeply"
LATE = "has to be compiled"
MANY = "10,000 fields"
LONG = "do not fit"  # tools are a part of the prompt, too


def chain(count: int, link: str = "$ref") -> dict[str, Any]:
    """A schema that reaches its end through so many definitions, one after the other."""

    def step(name: str) -> dict[str, Any]:
        following = {"$ref": f"#/$defs/{name}"}
        match link:
            case "properties":
                return {"type": "object", "properties": {"x": following}, "required": ["x"]}
            case "items":
                return {"type": "array", "items": following}
            case "$ref":
                return following
        return {link: [following, {"type": "null"}]}

    names = {f"a{number}": step(f"a{number + 1}") for number in range(count)}
    return {"$ref": "#/$defs/a0", "$defs": {**names, f"a{count}": {"type": "string"}}}


def cycle(count: int) -> dict[str, Any]:
    """Definitions that refer to each other in a circle, with nothing in it."""
    names = {f"a{number}": {"$ref": f"#/$defs/a{(number + 1) % count}"} for number in range(count)}
    return {"$ref": "#/$defs/a0", "$defs": names}


def nested(count: int, key: str = "items") -> dict[str, Any]:
    """A schema in a schema in a schema."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(count):
        schema = {key: schema}
    return schema


def rules(count: int) -> str:
    """A Lark grammar whose rules are a chain."""
    return "start: a0\n" + "\n".join(f'a{n}: "x" a{n + 1}' for n in range(count)) + f'\na{count}: "y"'


def schema(value: dict[str, Any]) -> dict[str, Any]:
    """As response_format."""
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}}


def tool(value: dict[str, Any]) -> dict[str, Any]:
    """As what a tool takes that has to be called."""
    function = {"name": "f", "parameters": value}
    return {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}


def structured(**value: Any) -> dict[str, Any]:
    """In one of vLLM's ways."""
    return {"structured_outputs": value}


SCHEMA, TOOLS, OUTPUTS = "response_format", "tools", "structured_outputs"
FORMS: dict[str, Form] = {
    "references, 3,000 in a chain": (schema(chain(3000)), 400, SCHEMA, DEEP),
    "objects, 4,000 in a chain": (schema(chain(4000, "properties")), 400, SCHEMA, DEEP),
    "arrays, 5,000 in a chain": (schema(chain(5000, "items")), 400, SCHEMA, DEEP),
    "anyOf, 5,000 in a chain": (schema(chain(5000, "anyOf")), 400, SCHEMA, DEEP),
    "oneOf, 5,000 in a chain": (schema(chain(5000, "oneOf")), 400, SCHEMA, DEEP),
    "allOf, 5,000 in a chain": (schema(chain(5000, "allOf")), 400, SCHEMA, DEEP),
    "a circle of 300 references": (schema(cycle(300)), 400, SCHEMA, "no answer can have this form"),
    "a circle of 5,000 references": (schema(cycle(5000)), 400, SCHEMA, DEEP),
    "a definition that is itself": (schema({"$ref": "#"}), 400, SCHEMA, "no answer can have this form"),
    "what is nested 200 deep": (schema(nested(200)), 400, SCHEMA, "100 levels"),
    "anyOf nested 200 deep": (schema({"anyOf": [nested(200, "not")]}), 400, SCHEMA, "100 levels"),
    "a tool of 5,000 references": (tool(chain(5000)), 400, TOOLS, LONG),
    "a tool of 2,000 objects": (tool(chain(2000, "properties")), 400, TOOLS, LONG),
    "a tool that is nested 200 deep": (tool(nested(200)), 400, TOOLS, "100 levels"),
    "5,000 rules": (structured(grammar=rules(5000)), 400, OUTPUTS, DEEP),
    "2,000 rules, which fit": (structured(grammar=rules(2000)), 200, None, ""),
    "a schema of 9,900 references": (structured(json=chain(9900)), 400, OUTPUTS, DEEP),
    "a schema of 18,000 references": (structured(json=chain(18_000)), 400, None, MANY),
    "parentheses, 4,000 deep": (structured(regex="(" * 4000 + "a" + ")" * 4000), 400, OUTPUTS, "cannot be used"),
    "parentheses of rules": (structured(grammar="start: " + "(" * 9000 + '"a"' + ")" * 9000), 400, OUTPUTS, ""),
    "a million letters by repetition": (structured(regex="(a{1000}){1000}"), 400, OUTPUTS, "spell out"),
    "a billion letters by repetition": (structured(regex="x(abc){1000000000}"), 400, OUTPUTS, "spell out"),
    "repetition behind a class": (structured(regex="[(]((a{1000})[(]){1000}"), 400, OUTPUTS, "spell out"),
    "repetition through terminals": (
        structured(grammar='start: A\nA: B{1000}\nB: C{1000}\nC: "abc"'), 400, OUTPUTS, "spell out"),
    "repetition in a pattern of a grammar": (
        structured(grammar='start: "a" /(a{1000}){1000}/'), 400, OUTPUTS, "spell out"),
    "repetition in a pattern of a schema": (
        schema({"type": "string", "pattern": "^(a{1000}){1000}$"}), 400, SCHEMA, "spell out"),
    "repetition in a name of a schema": (
        schema({"type": "object", "patternProperties": {"^(a{1000}){1000}$": {}}}), 400, SCHEMA, "spell out"),
    "a number that takes long": (schema({"type": "integer", "multipleOf": 1_000_003}), 400, SCHEMA, LATE),
    "a literal of a million letters": (schema({"const": "a" * 1_000_000}), 400, SCHEMA, "50,000 characters"),
    "choices of a million letters": (structured(choice=["a" * 1_000_000]), 400, OUTPUTS, "50,000 characters"),
    "two million characters of names": (
        schema({"enum": [f"value-{number:07d}" for number in range(100_000)]}), 400, SCHEMA, "1,000,000 characters"),
    "objects, 9,900 in a chain": (schema(chain(9900, "properties")), 400, SCHEMA, DEEP),
    "objects, 20,000 in a chain": (schema(chain(20_000, "properties")), 400, None, "200,000 lists"),
    "a chain of 150 objects, which fits": (schema(chain(150, "properties")), 200, None, ""),
    "4,096 ways by alternatives": (
        schema({"allOf": [{"anyOf": [{"required": [f"p{n}"], "properties": {f"p{n}": {}}}, {"required": [f"q{n}"],
                "properties": {f"q{n}": {}}}]} for n in range(12)]}), 400, SCHEMA, ""),
    "a reference to another machine": (schema({"$ref": "http://192.0.2.1/schema"}), 400, SCHEMA, ""),
    "a reference to a file": (schema({"$ref": "file:///etc/passwd"}), 400, SCHEMA, ""),
    "what is not to come": (structured(regex="(?!a)"), 400, OUTPUTS, "cannot be used"),
}  # fmt: skip
