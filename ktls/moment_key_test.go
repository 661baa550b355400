package ktls

// Where a change of keys is when the session moves. With a relay, a session whose
// socket is full cannot move while a KeyUpdate is to be sent: it is lent until there
// is room.
var keyMoments = []moment{
	{name: "peer's KeyUpdate just before", version: v13, run: func(m *mover) {
		m.peerUpdates(updateOnly)
		m.pull()
		m.move()
		m.echo("under the next key")
		m.works()
	}},
	{name: "peer's KeyUpdate just after", version: v13, run: func(m *mover) {
		m.echo("before")
		m.move()
		m.peerUpdates(updateOnly)
		m.works()
	}},
	{name: "peer's KeyUpdate comes while nobody owns it", version: v13, run: func(m *mover) {
		m.moveWhile(func() {
			m.peerUpdates(updateOnly)
			m.send(typeData, []byte("under the next key"))
		})
		m.wantRead("under the next key")
		m.works()
	}},
	{name: "peer's KeyUpdate unread, data of both keys around it", version: v13, run: func(m *mover) {
		m.send(typeData, []byte("old key, "))
		m.peerUpdates(updateOnly)
		m.send(typeData, []byte("new key, "))
		m.peerUpdates(updateOnly)
		m.send(typeData, []byte("newer key"))
		m.wantRead("old ")
		m.move()
		m.wantRead("key, new ")
		m.move()
		m.wantRead("key, newer key")
		m.works()
	}},
	{name: "at each byte of the peer's KeyUpdate record", version: v13, run: func(m *mover) {
		n := len(m.seal(typeHandshake, []byte(updateOnly)))
		m.out.seq--
		for cut := 1; cut < n; cut += m.step() {
			rec := m.seal(typeHandshake, []byte(updateOnly))
			m.rekeyOut()
			m.sendRaw(rec[:cut])
			m.pull()
			m.move()
			m.sendRaw(append(rec[cut:], m.seal(typeData, []byte("x"))...))
			m.wantRead("x")
		}
		m.works()
	}},
	{name: "between the pieces of the peer's KeyUpdate", version: v13, run: func(m *mover) {
		for cut := 1; cut < len(updateOnly); cut++ {
			m.send(typeHandshake, []byte(updateOnly[:cut]))
			m.pull()
			m.move()
			m.send(typeHandshake, []byte(updateOnly[cut:]))
			m.rekeyOut()
			m.send(typeData, []byte("x"))
			m.wantRead("x")
		}
		m.works()
	}},
	{name: "peer asked, answered before", version: v13, run: func(m *mover) {
		m.peerUpdates(updateRequest)
		m.pull()
		m.wantUpdate(updateOnly)
		m.move()
		m.works()
	}},
	{name: "peer asked, unread", version: v13, run: func(m *mover) {
		m.peerUpdates(updateRequest)
		m.move()
		m.send(typeData, []byte("x"))
		m.wantRead("x")
		m.wantUpdate(updateOnly)
		m.works()
	}},
	{name: "peer asked, the answer waits behind a full send buffer", version: v13, not: "relay", run: func(m *mover) {
		m.fill()
		m.peerUpdates(updateRequest)
		m.send(typeData, []byte("x"))
		m.wantRead("x")
		m.move()
		m.flush()
		m.wantUpdate(updateOnly)
		m.works()
	}},
	{name: "peer asked, the answer waits, then Close", version: v13, not: "relay", run: func(m *mover) {
		m.fill()
		m.peerUpdates(updateRequest)
		m.send(typeData, []byte("x"))
		m.wantRead("x")
		m.move()
		done := make(chan error, 1)
		go func() { done <- m.conn.Close() }()
		m.peerGets(func() {})
		m.wantUpdate(updateOnly)
		m.want(typeAlert, "\x01\x00")
		m.wantFIN()
		if err := <-done; err != nil {
			m.t.Errorf("Close: %v", err)
		}
	}},
	{name: "peer asked twice, the answer not sent", version: v13, not: "relay", run: func(m *mover) {
		m.conn.wmu.Lock() // a writer that is at it keeps the reader from answering
		for range 2 {
			m.peerUpdates(updateRequest)
		}
		m.send(typeData, []byte("x"))
		m.wantRead("x")
		m.conn.wmu.Unlock()
		m.move()
		m.write([]byte("reply"))
		m.wantUpdate(updateOnly)
		m.peerGets(func() {})
		m.works()
	}},
	{name: "our KeyUpdate just before", version: v13, run: func(m *mover) {
		m.write([]byte("old key"))
		m.update(false)
		m.move()
		m.peerGets(func() {})
		m.wantUpdate(updateOnly)
		m.works()
	}},
	{name: "our KeyUpdate just after", version: v13, run: func(m *mover) {
		m.echo("old key")
		m.move()
		m.update(false)
		m.wantUpdate(updateOnly)
		m.works()
	}},
	{name: "we asked, the peer answers after", version: v13, run: func(m *mover) {
		m.update(true)
		m.wantUpdate(updateRequest)
		m.move()
		if got := m.conn.asked.Load(); got != 1 {
			m.t.Errorf("the new owner waits for %d KeyUpdates", got)
		}
		m.peerUpdates(updateOnly)
		m.send(typeData, []byte("x"))
		m.wantRead("x")
		if got := m.conn.asked.Load(); got != 0 {
			m.t.Errorf("the new owner still waits for %d KeyUpdates", got)
		}
		m.works()
	}},
	{name: "both sides ask at once", version: v13, run: func(m *mover) {
		m.update(true)
		m.peerUpdates(updateRequest) // crosses ours
		m.move()
		m.wantUpdate(updateRequest)
		m.send(typeData, []byte("x"))
		m.wantRead("x")
		m.wantUpdate(updateOnly) // to what it asked
		m.peerUpdates(updateOnly)
		m.works()
	}},
	{name: "our KeyUpdate into a full send buffer", version: v13, not: "relay", run: func(m *mover) {
		m.fill()
		_ = m.conn.SetWriteDeadline(past)
		if err := m.conn.KeyUpdate(false); !isTimeout(err) {
			m.t.Fatalf("KeyUpdate: %v", err)
		}
		m.move()
		m.flush()
		m.update(false) // the first did nothing
		m.wantUpdate(updateOnly)
		m.works()
	}},
	{name: "KeyUpdate and close_notify unread", version: v13, run: func(m *mover) {
		m.send(typeData, []byte("old"))
		m.peerUpdates(updateOnly)
		m.send(typeData, []byte("new"))
		m.send(typeAlert, closeNotify)
		m.wantRead("o")
		m.move()
		m.wantRead("ldnew")
		m.wantEOF()
		m.closes()
	}},
	{name: "KeyUpdate, then FIN without close_notify", version: v13, run: func(m *mover) {
		m.peerUpdates(updateOnly)
		m.moveWhile(func() { _ = m.c.CloseWrite() })
		m.wantEnd(ErrTruncated)
		m.closes()
	}},
	// The answer meets the reset, of which the reader must hear all the same.
	{name: "peer asks and resets", version: v13, run: func(m *mover) {
		m.send(typeData, []byte("last words"))
		m.peerUpdates(updateRequest)
		m.wantRead("last")
		m.peerResets()
		m.finished()
		m.move()
		m.wantRead(" words")
		m.wantReset()
	}},
	{name: "32 KeyUpdates, the next after", version: v13, run: func(m *mover) {
		for range maxHandshakes {
			m.peerUpdates(updateOnly)
		}
		m.pull()
		m.move()
		m.peerUpdates(updateOnly)
		m.wantAlert(alertUnexpectedMessage)
	}},
}

// peerUpdates sends a KeyUpdate from the peer, which goes to its next key.
func (m *mover) peerUpdates(msg string) {
	m.t.Helper()
	m.send(typeHandshake, []byte(msg))
	m.rekeyOut()
}

// wantUpdate reads our KeyUpdate at the peer.
func (m *mover) wantUpdate(msg string) {
	m.t.Helper()
	m.want(typeHandshake, msg)
	m.rekeyIn()
}

func (m *mover) update(request bool) {
	m.t.Helper()
	if err := m.conn.KeyUpdate(request); err != nil {
		m.t.Fatalf("KeyUpdate: %v", err)
	}
}
