/*
 * Finds every occurrence of many needles in one pass.
 *
 * Run by whoever searches memory for private keys, as root. A key has up to sixty needles, so a
 * search with memmem(3) reads everything sixty times. This one takes steps (Wu and Manber, "A fast
 * algorithm for multi-pattern searching", 1994): it looks at the two octets at the end of a window,
 * and moves the window as far as no needle can be missed, mostly by its whole length. The window is
 * as long as the shortest needle. A needle that is everywhere does not keep the others from being
 * found, and neither thousands of needles nor those that memory is full of take it much longer.
 * Python threads run meanwhile.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>
#include <string.h>

#define MAX_WINDOW 255
/* How many steps are looked at together. */
#define AHEAD 8
#define PAIR(octets) ((octets)[0] << 8 | (octets)[1])
/* Needles are told from each other by so many octets of their beginnings, or a window's. */
#define MAX_BEGINNING 16
#define NONE (-1)

struct needle {
	const char *octets;
	Py_ssize_t length;
	/* How often it was found; and the next needle whose beginning may be the same. */
	Py_ssize_t found, next;
};

struct search {
	struct needle *needles;
	Py_ssize_t count;
	Py_ssize_t window;
	/* By the two octets at the window's end: how far it may be moved. */
	uint8_t step[1 << 16];
	/* By two octets: whether a needle begins with them. Memory is full of what a needle ends with. */
	uint8_t begins[1 << 16];
	/* By a hash of a needle's beginning, the first such needle. With thousands of them, to compare
	 * each would take more time than all the rest. */
	Py_ssize_t *first;
	size_t mask;
	/* What was found: places, each followed by its needle's number. There is room for so many. */
	Py_ssize_t *found;
	Py_ssize_t pairs, room, most;
};

static size_t place_of(const struct search *search, const uint8_t *octets)
{
	/* FNV-1a, by Fowler, Noll and Vo. */
	const Py_ssize_t length = search->window < MAX_BEGINNING ? search->window : MAX_BEGINNING;
	uint64_t hash = 0xcbf29ce484222325;
	for (Py_ssize_t at = 0; at < length; at++)
		hash = (hash ^ octets[at]) * 0x100000001b3;
	return (size_t)(hash ^ hash >> 32) & search->mask;
}

static void prepare(struct search *search)
{
	Py_ssize_t window = MAX_WINDOW;
	for (Py_ssize_t number = 0; number < search->count; number++)
		if (search->needles[number].length < window)
			window = search->needles[number].length;
	search->window = window;
	memset(search->step, window > 1 ? (int)window - 1 : 0, sizeof(search->step));
	for (Py_ssize_t number = 0; number < search->count; number++) {
		const uint8_t *octets = (const uint8_t *)search->needles[number].octets;
		if (window > 1)
			search->begins[PAIR(octets)] = 1;
		for (Py_ssize_t end = 2; end <= window; end++) {
			uint8_t *step = &search->step[PAIR(octets + end - 2)];
			if (window - end < *step)
				*step = (uint8_t)(window - end);
		}
	}
	for (size_t place = 0; place <= search->mask; place++)
		search->first[place] = NONE;
	/* From the last one to the first: so each list is in ascending order. */
	for (Py_ssize_t number = search->count; number-- > 0;) {
		struct needle *needle = &search->needles[number];
		Py_ssize_t *first = &search->first[place_of(search, (const uint8_t *)needle->octets)];
		needle->next = *first;
		*first = number;
	}
}

static int note(struct search *search, Py_ssize_t at, Py_ssize_t number)
{
	if (search->pairs == search->room) {
		const Py_ssize_t room = search->room ? 2 * search->room : 64;
		Py_ssize_t *found = PyMem_RawRealloc(search->found, (size_t)room * 2 * sizeof(*found));
		if (found == NULL)
			return 0;
		search->found = found;
		search->room = room;
	}
	search->found[2 * search->pairs] = at;
	search->found[2 * search->pairs++ + 1] = number;
	return 1;
}

/* What begins at this place. A needle that was found often enough is not looked for any more. */
static int compare(struct search *search, const uint8_t *octets, Py_ssize_t at, Py_ssize_t left)
{
	Py_ssize_t *link = &search->first[place_of(search, octets + at)];
	while (*link != NONE) {
		const Py_ssize_t number = *link;
		struct needle *needle = &search->needles[number];
		if (needle->length <= left && memcmp(octets + at, needle->octets, needle->length) == 0) {
			if (!note(search, at, number))
				return 0;
			if (++needle->found == search->most) {
				*link = needle->next;
				continue;
			}
		}
		link = &needle->next;
	}
	return 1;
}

/* Whether so many whole steps follow each other. To know it, none of them waits for the one before. */
static int are_whole_steps(const struct search *search, const uint8_t *end)
{
	const Py_ssize_t whole = search->window - 1;
	int others = 0;
	for (int ahead = 0; ahead < AHEAD; ahead++)
		others |= search->step[PAIR(end + ahead * whole)] ^ whole;
	return others == 0;
}

/* Returns 0 where there is no room for what is found. */
static int scan(struct search *search, const uint8_t *octets, Py_ssize_t length)
{
	const Py_ssize_t last = length - search->window, whole = search->window - 1;
	for (Py_ssize_t at = 0; at <= last;) {
		if (search->window > 1) {
			const uint8_t *end = octets + at + search->window - 2;
			uint8_t step = search->step[PAIR(end)];
			if (step == whole && last - at > AHEAD * whole && are_whole_steps(search, end)) {
				at += AHEAD * whole;
				continue;
			}
			if (step > 0 || !search->begins[PAIR(octets + at)]) {
				at += step > 0 ? step : 1;
				continue;
			}
		}
		if (!compare(search, octets, at, length - at))
			return 0;
		at++;
	}
	return 1;
}

static PyObject *as_list(const struct search *search)
{
	PyObject *list = PyList_New(0);
	for (Py_ssize_t pair = 0; list != NULL && pair < search->pairs; pair++) {
		const Py_ssize_t *found = &search->found[2 * pair];
		PyObject *item = Py_BuildValue("(nn)", found[0], found[1]);
		if (item == NULL || PyList_Append(list, item) < 0)
			Py_CLEAR(list);
		Py_XDECREF(item);
	}
	return list;
}

static PyObject *occurrences(PyObject *module, PyObject *arguments)
{
	Py_buffer octets;
	PyObject *needles, *list = NULL;
	Py_ssize_t most;
	int room;
	(void)module;
	if (!PyArg_ParseTuple(arguments, "y*O!n", &octets, &PyTuple_Type, &needles, &most))
		return NULL;
	struct search *search = PyMem_Calloc(1, sizeof(*search));
	if (search == NULL || most < 1) {
		PyErr_SetString(PyExc_ValueError, "no room");
		goto end;
	}
	search->count = PyTuple_GET_SIZE(needles);
	search->most = most;
	while (search->mask < 2 * (size_t)search->count)
		search->mask = 2 * search->mask + 1;
	search->needles = PyMem_Calloc(search->count + 1, sizeof(*search->needles));
	search->first = PyMem_Calloc(search->mask + 1, sizeof(*search->first));
	if (search->needles == NULL || search->first == NULL) {
		PyErr_NoMemory();
		goto end;
	}
	for (Py_ssize_t number = 0; number < search->count; number++) {
		struct needle *needle = &search->needles[number];
		char *text;
		if (PyBytes_AsStringAndSize(PyTuple_GET_ITEM(needles, number), &text, &needle->length) < 0)
			goto end;
		if (needle->length == 0) {
			PyErr_SetString(PyExc_ValueError, "an empty needle is everywhere");
			goto end;
		}
		needle->octets = text;
	}
	Py_BEGIN_ALLOW_THREADS
	prepare(search);
	room = scan(search, octets.buf, octets.len);
	Py_END_ALLOW_THREADS
	list = room ? as_list(search) : PyErr_NoMemory();
end:
	if (search != NULL) {
		PyMem_Free(search->needles);
		PyMem_Free(search->first);
		PyMem_RawFree(search->found);
	}
	PyMem_Free(search);
	PyBuffer_Release(&octets);
	return list;
}

static PyMethodDef methods[] = {
	{"occurrences", occurrences, METH_VARARGS,
	 "occurrences(octets, needles, most): where which of a tuple of needles is, in ascending order: "
	 "a list of (place, number), with so many of each needle at most. Raises ValueError for an empty "
	 "one."},
	{NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
	.m_base = PyModuleDef_HEAD_INIT,
	.m_name = "keyd.inspection.occurrences",
	.m_size = 0,
	.m_methods = methods,
};

PyMODINIT_FUNC PyInit_occurrences(void);
PyMODINIT_FUNC PyInit_occurrences(void)
{
	return PyModule_Create(&definition);
}
