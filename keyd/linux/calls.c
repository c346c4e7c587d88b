/*
 * Makes a list of system calls, in order.
 *
 * Run by workers and by the fork server. The list comes from Python, which has no way of its own to
 * make just these calls: ctypes would cost a worker some pages for each.
 */

#include "calls.h"

#include <errno.h>
#include <sys/syscall.h>
#include <unistd.h>

static PyObject *make(PyObject *module, PyObject *args)
{
	Py_buffer octets;
	struct calls calls;
	(void)module;
	if (!PyArg_ParseTuple(args, "y*", &octets))
		return NULL;
	int failed = take_calls(octets.buf, octets.len, &calls);
	for (Py_ssize_t at = 0; failed == 0 && at < calls.count; at++) {
		const int64_t *argument = calls.first[at].arguments;
		if (syscall(calls.first[at].number, argument[0], argument[1], argument[2],
		            argument[3], argument[4], argument[5]) == -1) {
			PyErr_SetFromErrno(PyExc_OSError);
			failed = -1;
		}
	}
	PyBuffer_Release(&octets);
	if (failed < 0)
		return NULL;
	Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
	{"make", make, METH_VARARGS,
	 "make(calls): make them, in order; raises OSError for the first that fails."},
	{NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
	.m_base = PyModuleDef_HEAD_INIT,
	.m_name = "keyd.linux.calls",
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
	{"madvise", SYS_madvise},
	{"mmap", SYS_mmap},
	{"prctl", SYS_prctl},
	{"prlimit64", SYS_prlimit64},
	{"pwrite64", SYS_pwrite64},
	{"seccomp", SYS_seccomp},
	{"setgroups", SYS_setgroups},
	{"setresgid", SYS_setresgid},
	{"setresuid", SYS_setresuid},
	{"shutdown", SYS_shutdown},
};

PyMODINIT_FUNC PyInit_calls(void);
PyMODINIT_FUNC PyInit_calls(void)
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
