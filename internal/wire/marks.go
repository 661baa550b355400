package wire

// Abilities are what a worker says in HELLO that it can do besides version 1.
type Abilities uint64

// AbleMarks: it takes MARKS, and says in that memory which sessions it is handling.
const AbleMarks Abilities = 1

// AbleSockets: in PARKED it sends the sockets back, if Welcome.Keeper wants that.
const AbleSockets Abilities = 4

// Marks are shared memory in which a worker says which sessions it is handling, for the
// case that it dies over one. Words of 64 bits, in the machine's byte order:
//
//	word 0     the number of words behind it that were ever used
//	word 1...  0, or one session: its id in the lower 62 bits, and what the worker does
//
// Every word is written with one store, so there is no half of it.
const (
	// MarkHandling: the application's code runs for this session.
	MarkHandling = 1 << 63
	// MarkWriting: it waits in the library's, and goes on with its own after that.
	MarkWriting = 1 << 62
	// MarkID is the mask of the id.
	MarkID = 1<<62 - 1
)

// AbleArena: it takes an arena with WELCOME, and keeps journals there.
const AbleArena Abilities = 2
