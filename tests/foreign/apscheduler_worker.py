"""django-apscheduler as its users run it: its own schema, its own jobs, a scheduler in a process.

A test starts it as a process of its own, so that it can be killed like one. Its hazard is to be
kinder than the real thing: everything that touches the database is the packages' own code. Jobs
repeat, once a day: one that runs only once is deleted as it begins, and then no execution of it is
recorded at all.
"""

import argparse
import time
from datetime import UTC, datetime
from pathlib import Path

import django  # type: ignore[import-untyped]
from apscheduler.schedulers.background import (  # type: ignore[import-untyped]
    BackgroundScheduler,
)
from apscheduler.schedulers.base import BaseScheduler  # type: ignore[import-untyped]
from apscheduler.schedulers.blocking import BlockingScheduler  # type: ignore[import-untyped]
from django.conf import settings  # type: ignore[import-untyped]
from django.core.management import call_command  # type: ignore[import-untyped]
from psycopg.conninfo import conninfo_to_dict

LOOK_SECONDS = 0.05


def main() -> None:
    """Do what the options say, in the order: schema, enqueue, work."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("database_url")
    parser.add_argument("--schema", action="store_true", help="create the schema")
    parser.add_argument("--enqueue", metavar="NAME", help="schedule jobs: quick ones, a long one")
    parser.add_argument("--quick", type=int, default=2, help="so many of them end at once")
    parser.add_argument("--until", default="", help="the long one ends when this file exists")
    parser.add_argument("--due", type=datetime.fromisoformat, help="when, instead of now")
    parser.add_argument("--work", metavar="NAME", help="schedule and run what is due, for ever")
    asked = parser.parse_args()
    configure(asked.database_url)
    if asked.schema:
        call_command("migrate", verbosity=0)
    if asked.enqueue:
        schedule(asked.enqueue, asked.quick, asked.until, asked.due or datetime.now(UTC))
    if asked.work:
        with_store(BlockingScheduler(timezone=UTC)).start()


def configure(url: str) -> None:
    """Django's settings, with the address as libpq reads it, so that every form of it will do."""
    parts = conninfo_to_dict(url)
    database = {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": parts.pop("dbname"),
        "USER": parts.pop("user", ""),
        "PASSWORD": parts.pop("password", None) or "",
        "HOST": parts.pop("host", ""),
        "PORT": parts.pop("port", ""),
        "OPTIONS": parts,
    }
    settings.configure(
        DATABASES={"default": database},
        INSTALLED_APPS=["django_apscheduler"],
        USE_TZ=True,
        TIME_ZONE="UTC",
    )
    django.setup()


def with_store(scheduler: BaseScheduler) -> BaseScheduler:
    """The scheduler, with its jobs and their executions in the database."""
    from django_apscheduler.jobstores import DjangoJobStore  # type: ignore[import-untyped]

    scheduler.add_jobstore(DjangoJobStore(), "default")
    return scheduler


def schedule(name: str, count: int, until: str, due: datetime) -> None:
    """Store the jobs, and run none of them: that is for whoever works.

    The scheduler is paused and never shut down: at its shutdown it would take up what is due.
    """
    scheduler = with_store(BackgroundScheduler(timezone=UTC))
    scheduler.start(paused=True)
    daily = {"trigger": "interval", "days": 1, "next_run_time": due, "misfire_grace_time": None}
    for number in range(count):
        scheduler.add_job(quick, id=f"{name}-quick-{number}", **daily)
    scheduler.add_job(hold, args=[until], id=f"{name}-hold", **daily)


def quick() -> None:
    pass


def hold(until: str) -> None:
    while not (until and Path(until).exists()):
        time.sleep(LOOK_SECONDS)


if __name__ == "__main__":
    main()
