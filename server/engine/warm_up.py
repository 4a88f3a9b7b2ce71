"""What of making an engine runs its backbone: proving determinism, laying out the pool, capturing decode steps."""

from server.engine.backbone import Backbone
from server.engine.config import EngineConfig
from server.engine.kv import KvPool
from server.engine.memory import make_pool
from server.engine.own_thread import in_own_thread


@in_own_thread
def warm_up(backbone: Backbone, config: EngineConfig) -> KvPool:
    """Make the backbone ready to serve as the config says, in a thread of its own; returns its pool. Blocking.

    Raises ValueError when the memory for keys and values cannot hold what it must (`make_pool`), BackboneError when
    determinism is asked for and the backbone cannot give it.
    """
    backbone.set_deterministic(config.max_rows if config.is_deterministic else None)
    pool = make_pool(backbone, config)
    if not config.is_deterministic:
        backbone.capture_decode(pool, config.max_rows)
    return pool
