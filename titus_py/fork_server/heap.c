/*
 * The C library's heap, which is Python's, too: where what workers inherit lies, and what is free.
 *
 * Run by the fork server. A worker copies each page that it writes to. What it allocates would go
 * where something was freed, to a page here and a page there. With these places taken, it comes from
 * the end of the heap. In C, because Python keeps some of what it frees, for the next object of the
 * kind: what Python code allocated meanwhile, in such places, would be kept there.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <malloc.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>

/* Sizes of blocks, the largest first, each a bit smaller than the one before. */
#define LARGEST (64 * 1024)
#define LARGE 1024
#define SMALLEST 16
/* How many blocks are allocated at most: more are only wanted by another C library's malloc. */
#define MOST_BLOCKS (64 * 1024)
/* How many blocks of a size come from the end of the heap until there is no hole of that size. */
#define BEHIND 16
/* How much may be free at the end of the heap before it is given back: as a rule (mallopt(3)), and
 * while blocks come and go there. */
#define FREE_AT_END (128 * 1024)
#define FREE_MEANWHILE (4 * BEHIND * LARGEST)

#ifdef __GLIBC__
/* Allocate blocks of each size, until they come from the end of the heap, or from between these. */
static void fill(uintptr_t first, uintptr_t last)
{
	void *behind[BEHIND];
	int left = MOST_BLOCKS;

	/* What is freed joins what is free beside it from now on, however small it is. */
	mallopt(M_MXFAST, 0);
	malloc_trim(0);
	/* Where what is free at the end begins. */
	const uintptr_t end = (uintptr_t)sbrk(0) - mallinfo2().keepcost;
	/* Or each size would have the kernel take these pages back, and make them anew. */
	mallopt(M_TRIM_THRESHOLD, FREE_MEANWHILE);
	for (size_t size = LARGEST; size >= SMALLEST; size -= size > LARGE ? 512 : 16) {
		int count = 0;
		void *block;
		while (left > 0 && count < BEHIND && (block = malloc(size)) != NULL) {
			const uintptr_t place = (uintptr_t)block;
			left--;
			if (place >= end || (place >= first && place < last))
				behind[count++] = block;
		}
		while (count > 0)
			free(behind[--count]);
	}
	mallopt(M_TRIM_THRESHOLD, FREE_AT_END);
	malloc_trim(FREE_AT_END);
}
#else
static void fill(uintptr_t first, uintptr_t last)
{
	(void)first;
	(void)last;
}
#endif

/* Allocate from the end of the heap, so that this ends at a multiple of ``boundary``; 0 if it cannot. */
static uintptr_t allocate_to(size_t room, size_t boundary, size_t *length)
{
#ifdef __GLIBC__
	const uintptr_t end = (uintptr_t)sbrk(0);
	void *block;
	uintptr_t last;

	/* Until there is no other hole of this size. */
	do
		last = (uintptr_t)(block = malloc(LARGEST));
	while (block != NULL && last + LARGEST <= end);
	free(block);
	/* Where something else lies behind the heap, the C library goes on elsewhere. */
	if (block == NULL || last >= (uintptr_t)sbrk(0))
		return 0;
	const size_t beyond = (last + room) % boundary;
	*length = room + (beyond > 0 ? boundary - beyond : 0);
	block = malloc(*length);
	if ((uintptr_t)block == last)
		return last;
	free(block);
#else
	(void)room;
	(void)boundary;
	(void)length;
#endif
	return 0;
}

static PyObject *extend(PyObject *module, PyObject *args)
{
	Py_ssize_t room, boundary;
	size_t length = 0;
	(void)module;
	if (!PyArg_ParseTuple(args, "nn", &room, &boundary))
		return NULL;
	const uintptr_t first = allocate_to((size_t)room, (size_t)boundary, &length);
	return Py_BuildValue("KK", (unsigned long long)first, (unsigned long long)(first + length));
}

static PyObject *give_room(PyObject *module, PyObject *place)
{
	(void)module;
	void *room = PyLong_AsVoidPtr(place);
	if (PyErr_Occurred())
		return NULL;
	free(room);
	Py_RETURN_NONE;
}

static PyObject *use_one_heap(PyObject *module, PyObject *nothing)
{
	(void)module;
	(void)nothing;
#ifdef __GLIBC__
	mallopt(M_MMAP_MAX, 0);
#endif
	Py_RETURN_NONE;
}

static PyObject *give_back(PyObject *module, PyObject *nothing)
{
	(void)module;
	(void)nothing;
#ifdef __GLIBC__
	malloc_trim(0);
#endif
	Py_RETURN_NONE;
}

static PyObject *fill_holes(PyObject *module, PyObject *args)
{
	unsigned long long first = 0, last = 0;
	(void)module;
	if (!PyArg_ParseTuple(args, "|KK", &first, &last))
		return NULL;
	PyGC_Collect();
	fill((uintptr_t)first, (uintptr_t)last);
	Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
	{"fill_holes", fill_holes, METH_VARARGS, "See heap.pyi."},
	{"extend", extend, METH_VARARGS, "See heap.pyi."},
	{"give_back", give_back, METH_NOARGS, "See heap.pyi."},
	{"give_room", give_room, METH_O, "See heap.pyi."},
	{"use_one_heap", use_one_heap, METH_NOARGS, "See heap.pyi."},
	{NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
	.m_base = PyModuleDef_HEAD_INIT,
	.m_name = "titus_py.fork_server.heap",
	.m_size = 0,
	.m_methods = methods,
};

PyMODINIT_FUNC PyInit_heap(void);
PyMODINIT_FUNC PyInit_heap(void)
{
	return PyModule_Create(&definition);
}
