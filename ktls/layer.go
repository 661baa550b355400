package ktls

// recordType is the content type of a record (RFC 8446 section 5.1).
type recordType uint8

const (
	typeChangeCipherSpec recordType = 20
	typeAlert            recordType = 21
	typeHandshake        recordType = 22
	typeData             recordType = 23
)

// control is one complete record other than non-empty application data. data is
// valid until the next call of read.
type control struct {
	typ  recordType
	data []byte
}

// recordLayer seals, opens and transports records of one established session.
// Conn keeps everything that does not depend on where that happens: alerts,
// KeyUpdate, close_notify, truncation, limits, floods. So the two layers behave
// alike, and a layer never decides what a record means.
//
// Conn calls the reading methods (read, waitRead, buffered, rekeyRead) under its read lock
// and the writing ones (write, writeControl, flush, unsent, rekeyWrite) under its
// write lock; the two groups run concurrently. export and wipe are called under
// both. Waiting happens in Go's poller only, on the socket's deadlines.
type recordLayer interface {
	kind() Layer

	// read gives application data (n > 0, and p holds it), or one complete control
	// record (ctl.typ != 0; an empty one has empty data), or an empty data record
	// (all zero, nil error). len(p) is at least 1. A control record of which only a
	// part has arrived or fits is kept by the layer until it is complete, also over
	// a deadline and export.
	//
	// io.EOF means FIN, whatever came before it. os.ErrDeadlineExceeded loses
	// nothing and can be tried again. A *recordError (bad MAC, bad header, record
	// too large, ...) is final and names the alert that Conn sends. Any other error
	// is the socket's.
	read(p []byte) (n int, ctl control, err error)

	// waitRead waits until read need not wait, or nearly so, without taking anything.
	// Errors other than the deadline's come from read.
	waitRead() error

	// buffered is the number of plaintext bytes opened and not yet given by read.
	buffered() int

	// write takes application data and returns how many plaintext bytes of p were
	// taken: these are sealed, once, and go out or are kept (in the layer or in the
	// kernel) to go out with the next write or flush as the same bytes. On nil error
	// n == len(p). Bytes kept from before go first.
	write(p []byte) (n int, err error)

	// writeControl takes one record of another type, at most maxPlaintext bytes,
	// never empty, after everything taken before. taken is exact: when true the
	// record is sealed and has its sequence number, even if err is not nil. With
	// wait false it does not wait for room in the socket: what cannot be sent is
	// kept (software) or not taken (kernel), and err is errWouldBlock.
	writeControl(typ recordType, p []byte, wait bool) (taken bool, err error)

	// flush sends what was sealed and kept. With wait false it does not wait and
	// returns errWouldBlock when something is left.
	flush(wait bool) error

	// unsent is the number of sealed bytes the layer keeps. What the kernel holds in
	// the socket travels with the socket and does not count.
	unsent() int

	// broken is the record error that a writing call met and read has not given yet:
	// the socket will not report it again. nil when there is none. Called under both
	// locks.
	broken() error
	// canRekey reports whether rekeyRead and rekeyWrite can work at all. When false,
	// Conn ends the session cleanly on a KeyUpdate and at the limit of a key.
	canRekey() bool

	// rearm is called after a handshake record that begins like a KeyUpdate and did not
	// complete one: reading goes on under the same key.
	rearm() error

	// rekeyRead and rekeyWrite go to the next generation of one direction's key
	// (RFC 8446 section 7.2). rekeyWrite is called when the KeyUpdate record was taken.
	rekeyRead() error
	rekeyWrite() error

	// export fills in what the layer adds to a session's record state; its slices
	// are the state's afterwards. The layer is not used again, except for wipe.
	export(st *layerState)

	// wipe zeroes keys and gives buffers back. The layer does not own the socket.
	wipe()
}

// params is what both layers need to know of a session. version is
// tls.VersionTLS12 or tls.VersionTLS13, suite one of those in suites.go.
type params struct {
	version uint16
	suite   uint16
	client  bool // our role
}

// direction is the key material of one direction of a session.
type direction struct {
	secret []byte // TLS 1.3: the current application traffic secret; TLS 1.2: nil
	key    []byte // 16 or 32 bytes
	iv     []byte // 12 bytes; TLS 1.2 AES-GCM: the 4-byte implicit part
	seq    uint64 // of the next record
}

func (d *direction) wipe() {
	clear(d.secret)
	clear(d.key)
	clear(d.iv)
	*d = direction{}
}

// layerState is what a layer adds to an exported session. tx and rx are the
// software layer's only: the kernel keeps its own in the socket.
type layerState struct {
	tx, rx direction
	raw    []byte     // received and not opened: whole and half records
	plain  []byte     // opened and not read
	sealed []byte     // sealed and not sent
	ctl    []byte     // part of a control record already taken from the kernel
	typ    recordType // of ctl; 0: none

	// The kernel layer's: where in the TCP stream record wireSeq-1 ends, see
	// wirePosition. 0, 0: not known.
	wire, wireSeq uint64

	// The software layer's: one more than the positions in the TCP streams of the first
	// byte that was not received, and of the first that was not sent. 0: not known.
	rxPos, txPos uint64

	// alerted says, when importing, that close_notify was sent and only the shutdown
	// is missing.
	alerted bool
}

// recordError is a record that ends the session with an alert.
type recordError struct {
	alert Alert
	what  string
}

func (e *recordError) Error() string { return e.what }

// maxPlaintext is the largest plaintext of one record (RFC 8446 section 5.1).
const maxPlaintext = 1 << 14

type layerError string

func (e layerError) Error() string { return string(e) }

// errWouldBlock is returned by flush and writeControl when wait is false.
const errWouldBlock layerError = "the socket takes no more now"

// The kernel layer's edge (kernel.go, probe.go), called from here:
//
//	// supportsKernel reports whether this kernel seals and opens version+suite in
//	// both directions; reason says why not, in words for a log line.
//	func supportsKernel(version, suite uint16) (ok bool, reason string)
//	// kernelPossible is the same before anything is negotiated: worth attaching?
//	func kernelPossible() (ok bool, reason string)
//	// attachKernel attaches the ULP, right after accept. nil when already attached.
//	func attachKernel(sock Socket) error
//	// newKernelLayer sets both keys on a socket to which the ULP is attached. It
//	// does not keep tx and rx; the caller wipes them. When the first setsockopt
//	// failed, the socket is untouched and err wraps errKernelUntouched, so that
//	// auto can go on in software.
//	func newKernelLayer(sock Socket, p params, tx, rx *direction) (recordLayer, error)
//	// importKernelLayer checks with getsockopt that sock has TLS_TX and TLS_RX of
//	// p's version and suite, and goes on.
//	func importKernelLayer(sock Socket, p params, st *layerState) (recordLayer, error)

// errKernelUntouched is wrapped by newKernelLayer when no key was set.
const errKernelUntouched layerError = "no key was set in the kernel"
