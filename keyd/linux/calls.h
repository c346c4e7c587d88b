/*
 * A list of system calls, as keyd/linux/process.py packs it.
 */

#ifndef KEYD_LINUX_CALLS_H
#define KEYD_LINUX_CALLS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>

/* A system call: its number and its arguments. */
struct call {
	int64_t number;
	int64_t arguments[6];
};

struct calls {
	const struct call *first;
	Py_ssize_t count;
};

/* The octets have to stay. Returns -1 with an exception where they are no calls. */
static inline int take_calls(const void *octets, Py_ssize_t length, struct calls *calls)
{
	if (length % (Py_ssize_t)sizeof(struct call) != 0) {
		PyErr_SetString(PyExc_ValueError, "not a whole number of calls");
		return -1;
	}
	calls->first = octets;
	calls->count = length / (Py_ssize_t)sizeof(struct call);
	return 0;
}

#endif
