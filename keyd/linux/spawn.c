/*
 * Makes a list of system calls, in order: in this process, or in a new child of clone(2).
 *
 * Run by the fork server and by workers. A child makes all of the calls before it runs any Python:
 * Python writes to its objects, and each page that it writes to would have to be copied first.
 * The list comes from Python (titus_py/fork_server/confinement.py).
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef CLONE_PIDFD
#define CLONE_PIDFD 0x00001000
#endif

/* A system call: its number and its arguments. Packed by keyd/linux/process.py. */
struct call {
	int64_t number;
	int64_t arguments[6];
};

struct calls {
	const struct call *first;
	Py_ssize_t count;
};

/* Releases the octets where they are no calls. */
static int take_calls(Py_buffer *octets, struct calls *calls)
{
	if (octets->len % (Py_ssize_t)sizeof(struct call) != 0) {
		PyBuffer_Release(octets);
		PyErr_SetString(PyExc_ValueError, "not a whole number of calls");
		return -1;
	}
	calls->first = octets->buf;
	calls->count = octets->len / (Py_ssize_t)sizeof(struct call);
	return 0;
}

/* Stops at the first call that fails, and returns its index, with errno; -1 if none fails. */
static int make_all(struct calls calls)
{
	for (Py_ssize_t at = 0; at < calls.count; at++) {
		const int64_t *argument = calls.first[at].arguments;
		if (syscall(calls.first[at].number, argument[0], argument[1], argument[2], argument[3],
		            argument[4], argument[5]) == -1)
			return (int)at;
	}
	return -1;
}

static PyObject *make(PyObject *module, PyObject *args)
{
	Py_buffer octets;
	struct calls calls;
	(void)module;
	if (!PyArg_ParseTuple(args, "y*", &octets) || take_calls(&octets, &calls) < 0)
		return NULL;
	const int failed = make_all(calls);
	const int error = errno;
	PyBuffer_Release(&octets);
	if (failed >= 0) {
		errno = error;
		return PyErr_SetFromErrno(PyExc_OSError);
	}
	Py_RETURN_NONE;
}

static PyObject *spawn(PyObject *module, PyObject *args)
{
	unsigned long flags;
	Py_buffer octets;
	struct calls calls;
	(void)module;
	if (!PyArg_ParseTuple(args, "ky*", &flags, &octets) || take_calls(&octets, &calls) < 0)
		return NULL;

	/*
	 * clone(2) and not clone3(2): systemd's filter on namespaces cannot see the flags of
	 * clone3(2) (systemd.exec(5), RestrictNamespaces=). The stack is NULL: the child uses
	 * its copy of ours. The kernel stores the pidfd in the third argument.
	 */
	int pidfd = -1;
	const long pid = syscall(SYS_clone, flags | CLONE_PIDFD | SIGCHLD, 0UL, &pidfd, 0UL, 0UL);
	const int failed = pid == 0 ? make_all(calls) : -1;
	const int error = pid < 0 || failed >= 0 ? errno : 0;
	PyBuffer_Release(&octets);
	return Py_BuildValue("liii", pid, pid > 0 ? pidfd : -1, failed, error);
}

static PyMethodDef methods[] = {
	{"make", make, METH_VARARGS,
	 "make(calls): make them, in order; raises OSError for the first that fails."},
	{"spawn", spawn, METH_VARARGS,
	 "spawn(flags, calls): clone(2); returns (pid, pidfd, failed, errno): see process.Child."},
	{NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
	.m_base = PyModuleDef_HEAD_INIT,
	.m_name = "keyd.linux.spawn",
	.m_size = 0,
	.m_methods = methods,
};

/* The numbers of the calls that a list may have, on this architecture. */
static const struct {
	const char *name;
	int number;
} numbers[] = {
	{"close_range", SYS_close_range},
	{"dup3", SYS_dup3},
	{"landlock_restrict_self", SYS_landlock_restrict_self},
	{"mmap", SYS_mmap},
	{"prctl", SYS_prctl},
	{"prlimit64", SYS_prlimit64},
	{"seccomp", SYS_seccomp},
	{"setgroups", SYS_setgroups},
	{"setresgid", SYS_setresgid},
	{"setresuid", SYS_setresuid},
	{"shutdown", SYS_shutdown},
};

PyMODINIT_FUNC PyInit_spawn(void);
PyMODINIT_FUNC PyInit_spawn(void)
{
	PyObject *module = PyModule_Create(&definition);
	PyObject *table = module != NULL ? PyDict_New() : NULL;
	if (table == NULL)
		goto failed;
	for (size_t at = 0; at < sizeof(numbers) / sizeof(numbers[0]); at++) {
		PyObject *number = PyLong_FromLong(numbers[at].number);
		const int result =
			number != NULL ? PyDict_SetItemString(table, numbers[at].name, number) : -1;
		Py_XDECREF(number);
		if (result < 0)
			goto failed;
	}
	if (PyModule_AddObjectRef(module, "NUMBERS", table) < 0)
		goto failed;
	Py_DECREF(table);
	return module;
failed:
	Py_XDECREF(table);
	Py_XDECREF(module);
	return NULL;
}
