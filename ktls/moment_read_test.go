package ktls

import (
	"crypto/tls"
	"io"
	"time"
)

// What the owner has received, opened or read when the session moves.
var readMoments = []moment{
	{name: "between records", run: func(m *mover) {
		m.echo("before")
		m.move()
		m.works()
	}},
	{name: "nothing received yet, data comes while nobody owns it", run: func(m *mover) {
		m.moveWhile(func() { m.send(typeData, []byte("meanwhile")) })
		m.wantRead("meanwhile")
		m.works()
	}},
	{name: "records in the socket", run: func(m *mover) {
		m.send(typeData, []byte("one "))
		m.send(typeData, nil)
		m.send(typeData, []byte("two "))
		m.send(typeData, pattern(maxPlaintext))
		m.move()
		m.wantRead("one two " + string(pattern(maxPlaintext)))
		m.works()
	}},
	{name: "at each byte of a record", run: func(m *mover) {
		n := len(m.seal(typeData, []byte("x")))
		m.out.seq--
		for cut := 1; cut < n; cut += m.step() {
			rec := m.seal(typeData, []byte{byte('a' + cut%26)})
			m.sendRaw(rec[:cut])
			m.pull()
			m.move()
			m.sendRaw(rec[cut:])
			m.wantRead(string(rune('a' + cut%26)))
		}
		m.works()
	}},
	{name: "at each byte of a record, moved while it waits in the socket", run: func(m *mover) {
		n := len(m.seal(typeData, []byte("x")))
		m.out.seq--
		for cut := 1; cut < n; cut += m.step() {
			rec := m.seal(typeData, []byte{byte('a' + cut%26)})
			m.moveWhile(func() { m.sendRaw(rec[:cut]) })
			m.move()
			m.sendRaw(rec[cut:])
			m.wantRead(string(rune('a' + cut%26)))
		}
		m.works()
	}},
	{name: "at several bytes of one large record", run: func(m *mover) {
		rec := m.seal(typeData, pattern(maxPlaintext))
		from := 0
		for _, cut := range []int{1, 4, 5, 6, smallBuf - 1, smallBuf, smallBuf + 1, 10_000, len(rec) - 1} {
			m.sendRaw(rec[from:cut])
			from = cut
			m.pull()
			m.move()
		}
		m.sendRaw(rec[from:])
		m.wantRead(string(pattern(maxPlaintext)))
		m.works()
	}},
	{name: "opened and unread", run: func(m *mover) {
		m.send(typeData, []byte("read, not read"))
		m.wantRead("read, ")
		m.move()
		m.wantRead("not read")
		m.works()
	}},
	{name: "opened and unread, byte by byte", run: func(m *mover) {
		m.send(typeData, []byte("slowly"))
		for _, b := range "slowly" {
			m.wantRead(string(b))
			m.move()
		}
		m.works()
	}},
	{name: "opened and unread, whole and half records behind", run: func(m *mover) {
		all := m.seal(typeData, pattern(maxPlaintext))
		all = append(all, m.seal(typeData, []byte("whole"))...)
		all = append(all, m.seal(typeData, nil)...)
		half := m.seal(typeData, []byte("half"))
		m.sendRaw(append(all, half[:9]...))
		m.wantRead(string(pattern(maxPlaintext)[:100]))
		m.move()
		m.wantRead(string(pattern(maxPlaintext)[100:200]))
		m.move()
		m.sendRaw(half[9:])
		m.wantRead(string(pattern(maxPlaintext)[200:]) + "wholehalf")
		m.works()
	}},
	{name: "read and pushed back, unread behind it", run: func(m *mover) {
		m.send(typeData, []byte("a line\nthe next"))
		m.wantRead("a line\nthe")
		m.conn.Unread([]byte("the"))
		m.conn.Unread([]byte("\n"))
		m.move()
		m.wantRead("\nthe ")
		m.conn.Unread([]byte("the "))
		m.move()
		m.wantRead("the next")
		m.works()
	}},
	{name: "half an alert", run: func(m *mover) {
		m.send(typeData, []byte("last"))
		rec := m.seal(typeAlert, []byte{levelWarning, byte(alertCloseNotify)})
		m.sendRaw(rec[:len(rec)-3])
		m.wantRead("last")
		m.pull()
		m.move()
		m.sendRaw(rec[len(rec)-3:])
		m.wantEnd(io.EOF)
		m.closesWriting()
	}},
	{name: "half a ticket", version: v13, client: true, run: func(m *mover) {
		ticket := append([]byte{msgNewSessionTicket, 0, 0x10, 0}, make([]byte, 0x1000)...)
		ticket[4+8] = 1 // nonce
		ticket[4+8+2], ticket[4+8+3] = 0x0f, 0xf0
		ticket = append(ticket[:4+8+4+0x0ff0], 0, 0)
		ticket[2], ticket[3] = byte((len(ticket)-4)>>8), byte(len(ticket)-4)
		for _, cut := range []int{1, 3, 4, 100, len(ticket) - 1} {
			m.send(typeHandshake, ticket[:cut])
			m.pull()
			m.move()
			m.send(typeHandshake, ticket[cut:])
			m.send(typeData, []byte("x"))
			m.wantRead("x")
		}
		m.works()
	}},
	{name: "half a ClientHello", version: tls.VersionTLS12, run: func(m *mover) {
		if m.conn.p.client {
			return
		}
		hello := append([]byte{msgClientHello, 0, 0, 50}, make([]byte, 50)...)
		m.send(typeHandshake, hello[:7])
		m.pull()
		m.move()
		m.send(typeHandshake, hello[7:])
		m.send(typeData, []byte("x"))
		m.wantRead("x")
		m.want(typeAlert, string([]byte{levelWarning, byte(alertNoRenegotiation)}))
		m.works()
	}},
	{name: "a refused renegotiation not yet answered", version: tls.VersionTLS12, run: func(m *mover) {
		if m.conn.p.client {
			return
		}
		m.conn.wmu.Lock() // a writer that is at it keeps the reader from answering
		m.send(typeHandshake, []byte{msgClientHello, 0, 0, 0})
		m.send(typeData, []byte("x"))
		m.wantRead("x")
		m.conn.wmu.Unlock()
		m.move()
		m.write([]byte("reply"))
		m.want(typeAlert, string([]byte{levelWarning, byte(alertNoRenegotiation)}))
		m.peerGets(func() {})
		m.works()
	}},
	// A peer cannot have its limits lifted by an upgrade.
	{name: "four warnings, the fifth after", run: func(m *mover) {
		for range maxWarnings {
			m.send(typeAlert, []byte{levelWarning, byte(alertUserCanceled)})
		}
		m.pull()
		m.move()
		m.send(typeAlert, []byte{levelWarning, byte(alertUserCanceled)})
		m.wantAlert(alertDecodeError)
	}},
	{name: "32 empty records, the next after", layer: "software", run: func(m *mover) {
		for range maxEmpties {
			m.send(typeData, nil)
		}
		m.pull()
		m.move()
		m.send(typeData, nil)
		m.wantAlert(alertDecodeError)
	}},
	{name: "deadlines", run: func(m *mover) {
		_ = m.conn.SetDeadline(past)
		sock, st, err := m.conn.Detach()
		if err != nil {
			m.t.Fatal(err)
		}
		defer st.Wipe()
		facts, _ := st.MarshalFacts()
		record, err := st.MarshalRecord()
		if err != nil {
			m.t.Fatal(err)
		}
		// The socket itself goes on here: with the deadlines it had.
		c, err := Import(sock, facts, record)
		if err != nil {
			m.t.Fatal(err)
		}
		m.t.Cleanup(func() { _ = c.Close() })
		m.conn = c
		if n, err := c.Read(make([]byte, 1)); n != 0 || !isTimeout(err) {
			m.t.Errorf("Read after a deadline that is over: %d, %v", n, err)
		}
		_ = c.SetDeadline(never)
		m.move() // over a descriptor that has none
		_ = m.conn.SetDeadline(time.Now().Add(testWait))
		m.works()
	}},
}
