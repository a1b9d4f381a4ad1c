# The commands of README.md, and the Debian package.
OUT = dist

.PHONY: demo test deb

demo test:
	bash -euo pipefail -c "$$(.ci/readme-command $@)"

deb:
	packaging/deb/build $(OUT)
