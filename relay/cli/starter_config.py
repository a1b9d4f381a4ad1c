"""A config.toml to start from in production: one source, one destination, every secret from outside."""

START = """\
# What can be set, and every default: config.toml at the root of the project. Check with `relay check-config`.

[server]
listen = "127.0.0.1:8080"       # where senders post; put a proxy with TLS before it
max_body = "2 MiB"
trusted_proxies = ["127.0.0.1"]

[admin]
listen = "127.0.0.1:8081"       # health and metrics; the JSON API only with a token
tokens = []

[retention]
events = "14d"
dead = "30d"

[sources.lazychat]
plugin = "lazychat"             # see `relay plugins list`
tokens = [{ env = "LAZYCHAT_TOKEN" }]

[destinations.crm]
url = "https://crm.example.com/hooks"
events = ["lazychat.*"]
secrets = [{ env = "CRM_WEBHOOK_SECRET" }]      # whsec_…; a second one here is how to rotate it
"""
