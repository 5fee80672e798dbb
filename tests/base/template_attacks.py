"""Chat templates that are made to hurt: each with what is said of it."""

TIME, MEMORY, LENGTH = "s of computing that", "more than the 256 MiB", "more than the 32 MiB of text"
RANGE, RECURSION = "Range too big", "recursion"
BOUND = "that a template may"  # whichever comes first on this machine
HARMLESS = "what it writes is nothing"


def doubled(times: int, result: str) -> str:
    """Two lists, each of a list twice, so many times; what is asked of them walks through 2^times."""
    return (
        "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(TIMES) %}{% set ns.a = [ns.a, ns.a] %}"
        "{% set ns.b = [ns.b, ns.b] %}{% endfor %}".replace("TIMES", str(times))
        + result
    )


def loops(depth: int, inside: str = "") -> str:
    """Loops within loops."""
    return "{% for i in range(99999) %}" * depth + inside + "{% endfor %}" * depth


def repeated(start: str, following: str) -> str:
    """A value that is made anew sixty times."""
    return (
        f"{{% set ns = namespace({start}) %}}{{% for i in range(60) %}}{{% set ns.a = {following} %}}{{% endfor %}}"
        "{{ ns.a | length }}"
    )


MEGABYTE = "{% set a = 'a' * 1000000 %}"
ATTACKS: dict[str, tuple[str, str]] = {
    "a loop in a loop": (loops(2), TIME),
    "ten loops in loops": (loops(10), TIME),
    "a loop over one that writes": (loops(2, "x"), ""),
    "a loop of a billion": ("{% for i in range(10**9) %}{% endfor %}", RANGE),
    "a loop of nothing but ifs": (loops(3, "{% if i %}{% endif %}"), TIME),
    "a loop with a filter": ("{% for i in range(99999) if range(99999) | list | sum < 0 %}{% endfor %}", TIME),
    "a loop that calls itself": ("{% for i in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}", RECURSION),
    "a macro that calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", RECURSION),
    "a macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", TIME),
    "a call that calls itself": (
        "{% macro f() %}{{ caller() }}{% call f() %}{% endcall %}{% endmacro %}{% call f() %}{% endcall %}", RECURSION),
    "a billion letters": ("{{ 'a' * 10**9 }}", MEMORY),
    "a quintillion letters": ("{{ 'a' * 10**18 }}", MEMORY),
    "a list of a billion": ("{{ ([1] * 10**9) | length }}", MEMORY),
    "a product of products": ("{{ 'a' * 100000 * 10000 }}", MEMORY),
    "letters doubled": (repeated("a='a'", "ns.a + ns.a"), BOUND),
    "letters doubled by joining": (repeated("a='a'", "ns.a ~ ns.a"), BOUND),
    "lists doubled": (repeated("a=[1]", "ns.a + ns.a"), BOUND),
    "lists in lists, written": (doubled(60, "{{ ns.a }}"), ""),
    "lists in lists, compared": (doubled(60, "{{ ns.a == ns.b }}"), TIME),
    "lists in lists, as JSON": (doubled(60, "{{ ns.a | tojson }}"), ""),
    "lists in lists, looked for": (doubled(60, "{{ ns.a in [ns.b] }}"), TIME),
    "a power of powers": ("{{ 9 ** (9 ** 9) }}", ""),
    "a power of numbers": ("{{ (10 ** 5000000) % 7 }}{{ (7 ** 9000000) % 5 }}", ""),
    "a number as text": ("{{ 10 ** 5000 }}", "4300 digits"),
    "centred in two billion": ("{{ 'x' | center(2000000000) }}", MEMORY),
    "indented by two billion": ("{{ 'x\ny' | indent(2000000000) }}", MEMORY),
    "JSON indented by a billion": ("{{ [1] | tojson(indent=1000000000) }}", MEMORY),
    "a width of two billion": ("{{ '%2000000000d' % 1 }}", MEMORY),
    "a format of two billion": ("{{ '{:2000000000}'.format(1) }}", MEMORY),
    "a format with a width from outside": ("{{ '{:{}}'.format(1, 2000000000) }}", MEMORY),
    "a filter of formats": ("{{ '%2000000000s' | format('x') }}", MEMORY),
    "justified in two billion": ("{{ 'x'.ljust(2000000000) }}", MEMORY),
    "filled with two billion zeros": ("{{ 'x'.zfill(2000000000) }}", MEMORY),
    "tabs of two billion": ("{{ '\t'.expandtabs(2000000000) }}", MEMORY),
    "a replacement by itself": (MEGABYTE + "{{ a.replace('a', a) }}", MEMORY),
    "the filter for it": (MEGABYTE + "{{ a | replace('a', a) }}", MEMORY),
    "a join of megabytes": (MEGABYTE + "{{ ([a] * 10000) | join(a) }}", ""),
    "megabytes written": (MEGABYTE + "{% for i in range(50) %}{{ a }}{% endfor %}", LENGTH),
    "many megabytes written": (MEGABYTE + "{% for i in range(9999) %}{{ a }}{% endfor %}", MEMORY),
    "megabytes in a block": (MEGABYTE + "{% set b %}{% for i in range(9999) %}{{ a }}{% endfor %}{% endset %}", MEMORY),
    "a batch of a billion": ("{{ [1] | batch(1000000000, 0) | list | length }}", MEMORY),
    "a thousand million words": ("{{ lipsum(n=1000000) }}", ""),
    "words wrapped one by one": (MEGABYTE + "{{ ('a ' * 5000000) | wordwrap(1) }}", ""),
    "what looks like links": ("{{ ('http://a.' * 1000000) | urlize }}", ""),
    "tags to strip": ("{{ ('<a>' * 9000000) | striptags }}", BOUND),
    "a sort of many": ("{% for i in range(99999) %}{% set x = range(99999) | sort %}{% endfor %}", TIME),
    "a product of lists": ("{% for i in range(99999) %}{% set x = range(99999) | map('string') | list %}{% endfor %}",
                           TIME),
    "groups of groups": ("{% for i in range(99999) %}{% set x = range(99999) | batch(2) | list %}{% endfor %}", TIME),
    "parentheses, 100,000 deep": ("{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}", ""),
    "brackets, 100,000 deep": ("{{ " + "[" * 100_000 + "]" * 100_000 + " }}", ""),
    "ifs, 20,000 deep": ("{% if 1 %}" * 20_000 + "{% endif %}" * 20_000, ""),
    "a sum of 200,000": ("{{ " + "+".join(["1"] * 200_000) + " }}", ""),
    "minus, 100,000 times": ("{{ " + "-" * 100_000 + "1 }}", ""),
    "filters, 50,000 in a row": ("{{ 'a'" + " | upper" * 50_000 + " }}", ""),
    "attributes, 50,000 in a row": ("{{ messages" + ".x" * 50_000 + " }}", ""),
    "a way out by classes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "a way out by globals": ("{{ raise_exception.__globals__ }}", HARMLESS),
    "a way out by formats": ("{{ '{0.__class__}'.format(1) }}", HARMLESS),
    "a way out by attr": ("{{ (''|attr('__class__')).__mro__ }}", "unsafe"),
    "another file": ("{% include '/etc/passwd' %}", "no loader"),
    "another template": ("{% extends '/etc/passwd' %}", "no loader"),
    "an import": ("{% import 'os' as os %}", "no loader"),
    "what it raises itself": ("{{ raise_exception('no system message') }}", "no system message"),
    "what is not Jinja": ("{% for %}", "Expected an expression"),
    "a filter that is not there": ("{{ 1 | nothing }}", "nothing"),
    "a loop without an end": ("{% for i in range(3) %}", "Unexpected end"),
}  # fmt: skip
