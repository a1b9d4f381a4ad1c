"""Nodes: the daemons that share the database, each with its lanes and jobs."""

from typing import Annotated

import msgspec
from aiohttp import web

from relay.api.context import Context
from relay.api.endpoints import Page, endpoint
from relay.api.views import Time, about
from relay.base.clock import rfc3339


class NodeView(msgspec.Struct, kw_only=True):
    """A node that has renewed its leases recently."""

    name: str
    version: str
    is_self: Annotated[bool, about("Whether this node answers the request.")]
    started_at: Time
    seen_at: Annotated[Time, about("Its latest renewal.")]
    lanes: Annotated[tuple[str, ...], about("The destinations that it delivers to.")]
    jobs: Annotated[tuple[str, ...], about("The jobs that only it runs.")]
    config: Annotated[
        str, about("Digest of its sources, destinations and rules; nodes should have the same one.")
    ]


class NodesApi:
    """Endpoints under `/api/nodes`."""

    def __init__(self, context: Context) -> None:
        self._context = context

    @endpoint(
        "GET", "/api/nodes", "listNodes", "List the nodes that share the database.", returns=Page[NodeView]
    )
    async def _list(self, _request: web.Request) -> Page[NodeView]:
        context = self._context
        nodes = await context.store.nodes.all()
        alone = context.store.nodes.alone
        return Page(
            tuple(
                NodeView(
                    name=node.name,
                    version=node.version,
                    is_self=node.is_self,
                    started_at=rfc3339(node.started_at),
                    seen_at=rfc3339(node.seen_at),
                    lanes=tuple(context.dispatcher.lanes) if alone else node.lanes,
                    jobs=tuple(context.jobs.of_cluster) if alone else node.jobs,
                    config=node.config[:12],
                )
                for node in nodes
            ),
            None,
        )
