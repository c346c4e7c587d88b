/*
 * The fork server's loop: take an order, fork a worker, answer.
 *
 * Run by the fork server, once it is confined. A worker leaves the loop, and goes on in Python. The
 * loop is in C because Python, whatever it does, writes to objects all over its heap: after each
 * fork, the fork server would have to copy those pages again. This writes to its stack only. For
 * the same reason a worker makes all of its calls here, before it runs any Python.
 *
 * The parent is trusted, but not with a uid that is not for workers: the fork server has what
 * root's uid gives, and the parent has not. A worker's calls come from Python
 * (titus_py/fork_server/confinement.py).
 */

#include "../../keyd/linux/calls.h"
#include "orders.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

/*
 * In a call, these arguments stand for what the order says. A system call that got one of them as it
 * is would take its lower half: nobody's uid, or a descriptor of -1.
 */
#define ORDERED_UID 0x4F574E000000FFFE
#define ORDERED_REPORT 0x4F574E01FFFFFFFF
#define ORDERED_SOCKET 0x4F574E02FFFFFFFF

static int64_t argument(int64_t given, const struct order *order)
{
	switch (given) {
	case ORDERED_UID:
		return ordered_uid(order);
	case ORDERED_REPORT:
		return order->descriptors[0];
	case ORDERED_SOCKET:
		return order->descriptors[1];
	default:
		return given;
	}
}

/* Stops at the first call that fails, and returns its index, with errno; -1 if none fails. */
static int make_all(struct calls calls, const struct order *order)
{
	for (Py_ssize_t at = 0; at < calls.count; at++) {
		int64_t a[6];
		for (int number = 0; number < 6; number++)
			a[number] = argument(calls.first[at].arguments[number], order);
		if (syscall(calls.first[at].number, a[0], a[1], a[2], a[3], a[4], a[5]) == -1)
			return (int)at;
	}
	return -1;
}

static PyObject *fork_as_ordered(PyObject *module, PyObject *args)
{
	int parent, pidfd;
	long long first, last;
	unsigned long flags;
	const char *octets[3], *title;
	Py_ssize_t lengths[3], title_length;
	unsigned long long title_address;
	struct calls before, own, after;
	(void)module;
	if (!PyArg_ParseTuple(args, "iLLky#y#y#Ky#", &parent, &first, &last, &flags, &octets[0],
	                      &lengths[0], &octets[1], &lengths[1], &octets[2], &lengths[2],
	                      &title_address, &title, &title_length) ||
	    take_calls(octets[0], lengths[0], &before) < 0 ||
	    take_calls(octets[1], lengths[1], &own) < 0 ||
	    take_calls(octets[2], lengths[2], &after) < 0)
		return NULL;
	for (struct order order;; explicit_bzero(&order, sizeof(order))) {
		const int taken = take_order(parent, &order);
		if (taken == 0)
			Py_RETURN_NONE;
		if (taken < 0 && errno == EINTR && PyErr_CheckSignals() == 0)
			continue;
		if (PyErr_Occurred())
			return NULL;
		if (taken < 0 && errno == EBADMSG)
			return PyErr_Format(PyExc_ValueError, "the parent sent what is no order");
		if (taken < 0)
			return PyErr_SetFromErrno(PyExc_OSError);
		if (ordered_uid(&order) < first || ordered_uid(&order) > last)
			return PyErr_Format(PyExc_ValueError, "the parent ordered a worker with a uid "
			                                      "that is not for workers");
		if (make_all(before, &order) >= 0)
			return PyErr_SetFromErrno(PyExc_OSError);
		/*
		 * clone(2) and not clone3(2): systemd's filter on namespaces cannot see the flags of
		 * clone3(2) (systemd.exec(5), RestrictNamespaces=). Not fork(3): its hooks repair what
		 * other threads may have locked, of which there are none, for some 180 page faults in
		 * each child. The stack is NULL: the child uses its copy of ours. The kernel stores
		 * the pidfd in the third argument.
		 */
		const long pid =
			syscall(SYS_clone, flags | CLONE_PIDFD | SIGCHLD, 0UL, &pidfd, 0UL, 0UL);
		if (pid == 0) {
			const int failed = make_all(own, &order);
			const int error = failed < 0 ? 0 : errno;
			if (title_length > 0)
				memcpy((void *)(uintptr_t)title_address, title, (size_t)title_length);
			return Py_BuildValue("ii", failed, error);
		}
		const int error = errno;
		close(order.descriptors[0]);
		close(order.descriptors[1]);
		if (make_all(after, &order) >= 0 ||
		    answer_order(parent, &order, pid, pidfd, error) < 0)
			return PyErr_SetFromErrno(PyExc_OSError);
		if (pid > 0)
			close(pidfd);
	}
}

static PyMethodDef methods[] = {
	{"fork_as_ordered", fork_as_ordered, METH_VARARGS, "See forking.pyi."},
	{NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
	.m_base = PyModuleDef_HEAD_INIT,
	.m_name = "titus_py.fork_server.forking",
	.m_size = 0,
	.m_methods = methods,
};

PyMODINIT_FUNC PyInit_forking(void);
PyMODINIT_FUNC PyInit_forking(void)
{
	PyObject *module = PyModule_Create(&definition);
	if (module == NULL)
		return NULL;
	PyObject *ordered = Py_BuildValue("LLL", ORDERED_UID, ORDERED_REPORT, ORDERED_SOCKET);
	if (ordered == NULL || PyModule_AddObjectRef(module, "ORDERED", ordered) < 0)
		Py_CLEAR(module);
	Py_XDECREF(ordered);
	return module;
}
