"""The schema of `registry.db` and how it grew: what a database of any earlier version of qhub is brought to."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing

# Append only: migration n brings a database from user_version n to n + 1.
MIGRATIONS = (
    """
    CREATE TABLE versions (
        id INTEGER PRIMARY KEY,
        name TEXT NOT NULL,
        number INTEGER NOT NULL CHECK (number >= 1),
        manifest_digest TEXT NOT NULL UNIQUE,
        content_digest TEXT NOT NULL,
        base_fingerprint TEXT,
        created_at TEXT NOT NULL,
        manifest TEXT NOT NULL,
        lineage TEXT NOT NULL,
        UNIQUE (name, number)
    ) STRICT;
    CREATE INDEX versions_by_content ON versions (content_digest);
    CREATE INDEX versions_by_base ON versions (base_fingerprint);
    CREATE TRIGGER versions_keep BEFORE UPDATE ON versions BEGIN SELECT RAISE(ABORT, 'versions are immutable'); END;
    CREATE TRIGGER versions_stay BEFORE DELETE ON versions BEGIN SELECT RAISE(ABORT, 'versions are immutable'); END;

    -- A removed version keeps its row, so that its number is never used again.
    CREATE TABLE removals (
        name TEXT NOT NULL,
        number INTEGER NOT NULL,
        removed_at TEXT NOT NULL,
        PRIMARY KEY (name, number),
        FOREIGN KEY (name, number) REFERENCES versions (name, number)
    ) STRICT;

    CREATE TABLE aliases (
        name TEXT NOT NULL,
        alias TEXT NOT NULL,
        number INTEGER NOT NULL,
        PRIMARY KEY (name, alias),
        FOREIGN KEY (name, number) REFERENCES versions (name, number)
    ) STRICT;

    CREATE TABLE alias_log (
        id INTEGER PRIMARY KEY,
        name TEXT NOT NULL,
        alias TEXT NOT NULL,
        old_number INTEGER,
        new_number INTEGER,
        changed_at TEXT NOT NULL
    ) STRICT;
    CREATE TRIGGER alias_log_keep BEFORE UPDATE ON alias_log BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END;
    CREATE TRIGGER alias_log_stay BEFORE DELETE ON alias_log BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END;
    """,
    """
    CREATE TABLE evaluations (
        id INTEGER PRIMARY KEY,
        name TEXT NOT NULL,
        number INTEGER NOT NULL,
        task TEXT NOT NULL,
        digest TEXT NOT NULL,
        evaluation TEXT NOT NULL,
        FOREIGN KEY (name, number) REFERENCES versions (name, number)
    ) STRICT;
    CREATE INDEX evaluations_by_version ON evaluations (name, number);
    """,
    """
    CREATE TABLE tags (
        name TEXT NOT NULL,
        number INTEGER NOT NULL,
        tag TEXT NOT NULL,
        PRIMARY KEY (name, number, tag),
        FOREIGN KEY (name, number) REFERENCES versions (name, number)
    ) STRICT;
    CREATE INDEX tags_by_tag ON tags (tag);

    -- What a person wrote later; the description a version was made with is in its lineage.
    CREATE TABLE descriptions (
        name TEXT NOT NULL,
        number INTEGER NOT NULL,
        description TEXT NOT NULL,
        PRIMARY KEY (name, number),
        FOREIGN KEY (name, number) REFERENCES versions (name, number)
    ) STRICT;

    -- Content that a running process uses: it is not collected before the lease ends (seconds since 1970).
    CREATE TABLE leases (
        content_digest TEXT NOT NULL,
        holder TEXT NOT NULL,
        expires_at REAL NOT NULL,
        PRIMARY KEY (content_digest, holder)
    ) STRICT;

    ALTER TABLE alias_log ADD COLUMN action TEXT NOT NULL DEFAULT 'set';

    -- The newest score of each task and metric, from lineages and evaluations, for filters and sorting.
    CREATE TABLE scores (
        name TEXT NOT NULL,
        number INTEGER NOT NULL,
        task TEXT NOT NULL,
        metric TEXT NOT NULL,
        value REAL NOT NULL,
        PRIMARY KEY (name, number, task, metric)
    ) STRICT;
    CREATE INDEX scores_by_metric ON scores (metric, value);
    CREATE TRIGGER scores_of_version AFTER INSERT ON versions BEGIN
        INSERT OR REPLACE INTO scores
        SELECT new.name, new.number, task.key, metric.key, metric.value
        FROM json_each(new.lineage, '$.metrics') task,
            json_each(CASE WHEN task.type = 'object' THEN task.value ELSE '{}' END, '$.adapter') metric
        WHERE metric.type IN ('integer', 'real') AND typeof(metric.key) = 'text' AND typeof(task.key) = 'text';
    END;
    CREATE TRIGGER scores_of_evaluation AFTER INSERT ON evaluations BEGIN
        DELETE FROM scores WHERE name = new.name AND number = new.number AND task = new.task;
        INSERT OR REPLACE INTO scores
        SELECT new.name, new.number, new.task, metric.key, metric.value
        FROM json_each(new.evaluation, '$.adapter') metric
        WHERE metric.type IN ('integer', 'real') AND typeof(metric.key) = 'text';
    END;

    CREATE VIRTUAL TABLE search USING fts5 (name, description, tags, recipe);
    CREATE TRIGGER search_version AFTER INSERT ON versions BEGIN
        INSERT INTO search (rowid, name, description, tags, recipe) VALUES (
            new.id, new.name, json_extract(new.lineage, '$.description'), '', json_extract(new.lineage, '$.recipe')
        );
    END;
    CREATE TRIGGER search_removed AFTER INSERT ON removals BEGIN
        DELETE FROM search WHERE rowid = (SELECT id FROM versions WHERE name = new.name AND number = new.number);
    END;
    CREATE TRIGGER search_tagged AFTER INSERT ON tags BEGIN
        UPDATE search SET tags = (
            SELECT group_concat(tag, ' ') FROM tags WHERE name = new.name AND number = new.number
        ) WHERE rowid = (SELECT id FROM versions WHERE name = new.name AND number = new.number);
    END;
    CREATE TRIGGER search_untagged AFTER DELETE ON tags BEGIN
        UPDATE search SET tags = (
            SELECT group_concat(tag, ' ') FROM tags WHERE name = old.name AND number = old.number
        ) WHERE rowid = (SELECT id FROM versions WHERE name = old.name AND number = old.number);
    END;
    CREATE TRIGGER search_described AFTER INSERT ON descriptions BEGIN
        UPDATE search SET description = new.description
        WHERE rowid = (SELECT id FROM versions WHERE name = new.name AND number = new.number);
    END;

    INSERT INTO search (rowid, name, description, tags, recipe)
    SELECT id, name, json_extract(lineage, '$.description'), '', json_extract(lineage, '$.recipe')
    FROM versions LEFT JOIN removals r USING (name, number) WHERE r.name IS NULL;
    INSERT OR REPLACE INTO scores
    SELECT v.name, v.number, task.key, metric.key, metric.value
    FROM versions v, json_each(v.lineage, '$.metrics') task,
        json_each(CASE WHEN task.type = 'object' THEN task.value ELSE '{}' END, '$.adapter') metric
    WHERE metric.type IN ('integer', 'real') AND typeof(metric.key) = 'text' AND typeof(task.key) = 'text';
    INSERT OR REPLACE INTO scores
    SELECT e.name, e.number, e.task, metric.key, metric.value
    FROM (SELECT * FROM evaluations ORDER BY id) e, json_each(e.evaluation, '$.adapter') metric
    WHERE metric.type IN ('integer', 'real') AND typeof(metric.key) = 'text';
    """,
    """
    -- How requests for a plain name are split between its aliases; place: the order in which users are dealt out.
    CREATE TABLE splits (
        name TEXT NOT NULL,
        alias TEXT NOT NULL,
        share INTEGER NOT NULL CHECK (share > 0),
        place INTEGER NOT NULL,
        PRIMARY KEY (name, alias)
    ) STRICT;
    """,
    """
    -- Aliases, tags and descriptions as they were recorded, one JSON record a time; each is a blob, too (journal.py).
    CREATE TABLE marks (id INTEGER PRIMARY KEY, record TEXT NOT NULL) STRICT;
    CREATE TRIGGER marks_keep BEFORE UPDATE ON marks BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END;
    CREATE TRIGGER marks_stay BEFORE DELETE ON marks BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END;
    """,
    """
    -- How far the ledger beside the database was read, and the lines of our own not met there yet (ledger.py).
    CREATE TABLE ledger_state (id INTEGER PRIMARY KEY CHECK (id = 1), size INTEGER NOT NULL) STRICT;
    CREATE TABLE ledger_pending (id INTEGER PRIMARY KEY AUTOINCREMENT, line TEXT NOT NULL) STRICT;
    CREATE INDEX ledger_pending_by_line ON ledger_pending (line);

    -- What the ledger names and nobody has any more. A version's number stays taken.
    CREATE TABLE lost (digest TEXT PRIMARY KEY, kind TEXT NOT NULL, subject TEXT NOT NULL,
        name TEXT, number INTEGER) STRICT;
    CREATE INDEX lost_by_name ON lost (name, number);

    -- Sorting by a metric reads scores in their order; parents are found by digest, imported ones, too.
    CREATE INDEX scores_by_version ON scores (metric, name, number, task, value);
    CREATE INDEX versions_by_origin ON versions (json_extract(lineage, '$.imported_from.manifest_digest'));
    """,
    """
    -- Who moved an alias; the records of all changes are found by their kind and by the name they are about.
    ALTER TABLE alias_log ADD COLUMN actor TEXT;
    CREATE INDEX marks_by_kind ON marks (json_extract(record, '$.mark'), json_extract(record, '$.name'));
    CREATE INDEX marks_by_name ON marks (json_extract(record, '$.name'));
    """,
    """
    -- What lists filter, count and sort by, of the versions that were not removed: a row of versions has its whole
    -- lineage in it, and reading all of them for one page took longer with every version. Triggers keep both tables,
    -- whoever writes. ANY: what a lineage says is compared as it is.
    CREATE TABLE listed (
        id INTEGER PRIMARY KEY,
        name TEXT NOT NULL,
        number INTEGER NOT NULL,
        created_at TEXT NOT NULL,
        base_fingerprint TEXT,
        base_name ANY,
        base_hub_id ANY,
        kind ANY,
        task ANY
    ) STRICT;
    CREATE UNIQUE INDEX listed_by_name ON listed (name, number);
    CREATE INDEX listed_by_base ON listed (base_fingerprint);
    CREATE TRIGGER listed_version AFTER INSERT ON versions BEGIN
        INSERT INTO listed VALUES (
            new.id, new.name, new.number, new.created_at, new.base_fingerprint,
            json_extract(new.lineage, '$.base.name'), json_extract(new.lineage, '$.base.hub_id'),
            json_extract(new.lineage, '$.kind'), json_extract(new.lineage, '$.task')
        );
    END;
    CREATE TRIGGER listed_removed AFTER INSERT ON removals BEGIN
        DELETE FROM listed WHERE name = new.name AND number = new.number;
    END;

    -- What each version was made of, to find what was made of one.
    CREATE TABLE parents (id INTEGER NOT NULL, digest ANY, reference ANY) STRICT;
    CREATE INDEX parents_by_digest ON parents (digest);
    CREATE INDEX parents_by_reference ON parents (reference);
    CREATE TRIGGER parents_of_version AFTER INSERT ON versions BEGIN
        INSERT INTO parents
        SELECT new.id, json_extract(p.value, '$.manifest_digest'), json_extract(p.value, '$.reference')
        FROM json_each(new.lineage, '$.parents') p WHERE p.type = 'object';
    END;

    INSERT INTO listed
    SELECT v.id, v.name, v.number, v.created_at, v.base_fingerprint, json_extract(v.lineage, '$.base.name'),
        json_extract(v.lineage, '$.base.hub_id'), json_extract(v.lineage, '$.kind'), json_extract(v.lineage, '$.task')
    FROM versions v LEFT JOIN removals r USING (name, number) WHERE r.name IS NULL;
    INSERT INTO parents
    SELECT v.id, json_extract(p.value, '$.manifest_digest'), json_extract(p.value, '$.reference')
    FROM versions v, json_each(v.lineage, '$.parents') p WHERE p.type = 'object';
    """,
)


def apply_migrations(connection: sqlite3.Connection, applied: int) -> None:
    """Bring the schema from `applied` to the newest, inside the caller's transaction."""
    for migration in MIGRATIONS[applied:]:
        for statement in _statements(migration):
            connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")


def schema_problem(connection: sqlite3.Connection) -> str | None:
    """What differs between the schema of a database and the newest, None if nothing does."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as model:
        apply_migrations(model, 0)
        should = _schema(model)
    found = _schema(connection)
    if found == should:
        return None
    names = sorted({name for _, name, _ in found ^ should})
    return f"its schema is not qhub's ({', '.join(names)[:120]!a})"


def _schema(connection: sqlite3.Connection) -> set[tuple[str, str, str]]:
    query = "SELECT type, name, coalesce(sql, '') FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'"
    return {(str(kind), str(name), str(sql)) for kind, name, sql in connection.execute(query)}


def _statements(script: str) -> Iterator[str]:
    """The statements of a script one by one; `executescript` would commit between them."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
