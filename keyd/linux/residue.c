/*
 * Overwrites what reading a private key has left behind in memory.
 *
 * Run by keyd, right after cryptography has read an elliptic curve's key: it frees a copy of the
 * secret number without clearing it, and OpenSSL's check of the key leaves one on the stack. Python
 * reaches neither.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdlib.h>
#include <string.h>

/* A fourth of a thread's stack in keyd. Reading a key takes far less. */
#define STACK_OCTETS (128 * 1024)
/*
 * malloc(3) gives a thread first what it has freed last, of each size: with 64-bit addresses, there
 * is a size for every 16 octets. A curve's number takes 72 octets at most. Reading a key frees far
 * fewer blocks than these.
 */
#define SMALLEST 24
#define LARGEST 136
#define STEP 16
#define BLOCKS 64

static __attribute__((noinline)) void overwrite_stack(void)
{
	unsigned char below[STACK_OCTETS];
	explicit_bzero(below, sizeof(below));
}

static void overwrite_freed(size_t size)
{
	void *taken[BLOCKS];
	for (size_t at = 0; at < BLOCKS; at++) {
		taken[at] = malloc(size);
		if (taken[at] != NULL)
			explicit_bzero(taken[at], size);
	}
	for (size_t at = 0; at < BLOCKS; at++)
		free(taken[at]);
}

static PyObject *overwrite(PyObject *module, PyObject *ignored)
{
	(void)module;
	(void)ignored;
	overwrite_stack();
	for (size_t size = SMALLEST; size <= LARGEST; size += STEP)
		overwrite_freed(size);
	Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
	{"overwrite", overwrite, METH_NOARGS,
	 "overwrite(): clear the stack below the caller, and the small blocks that this thread freed."},
	{NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
	.m_base = PyModuleDef_HEAD_INIT,
	.m_name = "keyd.linux.residue",
	.m_size = 0,
	.m_methods = methods,
};

PyMODINIT_FUNC PyInit_residue(void);
PyMODINIT_FUNC PyInit_residue(void)
{
	return PyModule_Create(&definition);
}
