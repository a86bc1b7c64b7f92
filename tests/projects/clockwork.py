"""An app with a schedule: a task that runs several times a second."""

from datetime import timedelta

from proj import app

app.conf.beat_schedule = {
    "often": {"task": "proj.note", "schedule": timedelta(seconds=0.3), "args": ("beats", "beat")}
}
