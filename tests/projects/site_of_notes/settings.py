"""Settings of the project; those of Celery from the JSON in ``TEST_CONFIG``, as ``CELERY_...``."""

import json
import os
from pathlib import Path

SECRET_KEY = "none"
USE_TZ = True
INSTALLED_APPS = ["site_of_notes.notes"]
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": Path("notes.sqlite").absolute(),
        "OPTIONS": {"timeout": 30},
    }
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

globals().update(
    {
        f"CELERY_{name.upper()}": value
        for name, value in json.loads(os.environ.get("TEST_CONFIG", "{}")).items()
    }
)
