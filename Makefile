# The commands of README.md, tests with PostgreSQL, the generated parts of the pages, the Debian package.
OUT = dist

.PHONY: screenshots demo test test-postgres test-pooler docs deb

demo test:
	bash -euo pipefail -c "$$(.ci/readme-command $@)"

# All tests that use a store, with PostgreSQL; then through PgBouncer. Both start Debian's server.
test-postgres test-pooler: export RELAY_TEST_STORES = postgres
test-pooler: export RELAY_TEST_POOLER = 1
test-postgres test-pooler:
	.venv/bin/pytest tests/unit tests/daemon tests/docs tests/torture tests/browser

# Rewrite help pages and the tables of commands, endpoints, metrics and keys. Read the difference before you commit it.
docs: export PYTHONPATH = tests/helpers
docs:
	.venv/bin/python -m tests.golden
	.venv/bin/python tests/docs/test_docs.py
	.venv/bin/python tests/docs/test_config_reference.py
	.venv/bin/python tests/docs/test_config_schema.py
	.venv/bin/python tests/docs/test_presets_page.py
	.venv/bin/python tests/docs/test_generic_page.py

# The pictures of the dashboard; needs chromium.
screenshots: export PYTHONPATH = tests/helpers
screenshots:
	.venv/bin/python -m tests.browser.screenshots

deb:
	packaging/deb/build $(OUT)
