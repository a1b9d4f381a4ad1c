# The commands of README.md, the generated parts of the pages, the Debian package.
OUT = dist

.PHONY: screenshots demo test docs deb

demo test:
	bash -euo pipefail -c "$$(.ci/readme-command $@)"

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
