from titus_py.fork_server import forking as forking
from titus_py.fork_server import heap as heap
from titus_py.fork_server import immortal as immortal
from titus_py.worker import flow as flow
from titus_py.worker import transcript as transcript
